"""Our numbers made comparable: each with its place in the tables and the published numbers it stands beside."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from relloc.reports.apart import set_apart, tell_images_apart
from relloc.reports.groups import CARD_GROUP, foreign_view, group_of, view_of
from relloc.reports.labels import label_lines
from relloc.reports.measured import Line, Measured, Run, newest
from relloc.reports.places import FEATURES, Place, place
from relloc.reports.published import (
    CARD,
    CARD_OSS,
    PUBLISHED_MODEL,
    RANDOM,
    SUPERVISED,
    Published,
    accepted,
    published_numbers,
)
from relloc.results import Result

INSIDE, ABOVE, BELOW = "≈", "+", "\N{MINUS SIGN}"
MARK_WORDS = {INSIDE: "inside", ABOVE: "above", BELOW: "below"}
CARD_LAYER = FEATURES[3]  # the best SVM layer of the published card, at which its low-shot numbers are
# With which published row a line of ours is compared: the first that has the number
_COMPARED_WITH = {"random": (RANDOM,), "torchvision": (SUPERVISED,)}
_HIGHER_IS_NOT_BETTER = ("label_free",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One number of ours.

    `group` is `CARD_GROUP` or names the other images it was measured on. `place` is None for
    numbers that no table shows. `beside` are the published numbers it is compared with, `best`
    whether none of ours in its column is higher. `why` says how the layer was chosen, where one was.
    """

    measured: Measured
    label: str
    group: str
    place: Place | None
    beside: tuple[Published, ...] = ()
    best: bool = False
    why: str = ""

    @property
    def result(self) -> Result:
        return self.measured.result

    @property
    def mark(self) -> str:
        """`INSIDE`, `ABOVE` or `BELOW` the tolerance of the published numbers; "" without one."""
        if not self.beside:
            return ""
        low, high = accepted(self.beside)
        value, rounding = self.result.value, 1e-9
        return BELOW if value < low - rounding else ABOVE if value > high + rounding else INSIDE


def make_entries(measured: Iterable[Measured]) -> list[Entry]:
    """All numbers, the newest of those measured alike, lines in the order in which tables show them."""
    kept = set_apart(tell_images_apart(newest(measured)))
    labels = label_lines({each.line for each in kept})
    layers = _low_shot_layers(kept)
    entries = [_entry(each, labels[each.line], layers) for each in kept]
    order = {line: number for number, line in enumerate(labels)}
    return _mark_best(sorted(entries, key=lambda entry: order[entry.measured.line]))


def _entry(each: Measured, label: str, layers: Mapping[tuple[Line, str, str], tuple[str, str]]) -> Entry:
    row, group = each.result, group_of(each.result, each.images)
    where, why = place(row.eval, row.layer, row.metric), ""
    if row.eval == "voc07_low_shot":
        layer, why = layers[each.line, group, view_of(row)]
        where = where if row.layer == layer else None
    view = foreign_view(row)
    beside = published_beside(each.line, where) if where and group == CARD_GROUP and not view else ()
    if where and view:
        where = dataclasses.replace(where, setting=", ".join(filter(None, (where.setting, view))))
    if where and group == CARD_GROUP:
        where = dataclasses.replace(where, images=each.images)
    return Entry(measured=each, label=label, group=group, place=where, beside=beside, why=why)


def _low_shot_layers(kept: Iterable[Measured]) -> dict[tuple[Line, str, str], tuple[str, str]]:
    """By line, group and view of low-shot numbers, at which layer they are reported, and why."""
    shots: dict[tuple[Line, str, str], Run] = {}
    best: dict[tuple[Line, str, str], list[Measured]] = {}
    for each in kept:
        group, view = group_of(each.result, each.images), view_of(each.result)
        if each.result.eval == "voc07_low_shot":
            shots[each.line, group, view] = each.run
        if (each.result.eval, each.result.metric) == ("voc07_svm", "map_best"):
            best.setdefault((each.line.whole, group, view), []).append(each)
    return {
        (line, group, view): _low_shot_layer(run, best.get((line.whole, group, view), []))
        for (line, group, view), run in shots.items()
    }


def _low_shot_layer(run: Run, best: Sequence[Measured]) -> tuple[str, str]:
    """The best SVM layer of the run that measured low-shot, else the newest of the line."""
    for each in (*(each for each in best if each.run == run), *reversed(best)):
        where = "the same run" if each.run == run else f"run {each.run.name}"
        return each.result.layer, f"low-shot at {each.result.layer}, the best SVM layer of {where}"
    return CARD_LAYER, f"low-shot at {CARD_LAYER} as on the published card, no best SVM layer being known"


def published_beside(line: Line, where: Place) -> tuple[Published, ...]:
    """The published numbers that a line's cell is compared with; of the published model only."""
    if line.model != PUBLISHED_MODEL or where.setting in FEATURES:
        return ()
    for row in _COMPARED_WITH.get(line.checkpoint, (CARD, CARD_OSS)):
        found = tuple(each for each in published_numbers() if each.row == row and _is_at(each, where))
        if found:
            return found
    return ()


def _is_at(number: Published, where: Place) -> bool:
    there = place(number.evaluation, number.layer, number.metric)
    return there is not None and (there.section, there.column) == (where.section, where.column)


def _mark_best(entries: Sequence[Entry]) -> list[Entry]:
    """Marks the highest of several rows of ours in a column and setting, supervised weights aside."""
    contests: dict[tuple[str, Place | None], list[float]] = {}
    for each in filter(_competes, entries):
        contests.setdefault(_contest(each), []).append(each.result.value)
    highest = {key: max(values) for key, values in contests.items() if len(values) > 1}
    return [
        dataclasses.replace(each, best=True)
        if _competes(each) and each.result.value == highest.get(_contest(each))
        else each
        for each in entries
    ]


def _contest(entry: Entry) -> tuple[str, Place | None]:
    """Who competes: the layers of nearest neighbors with each other, which stand in one column."""
    where = entry.place
    if where and entry.result.eval == "knn":
        where = dataclasses.replace(where, setting=foreign_view(entry.result))
    return entry.group, where


def _competes(entry: Entry) -> bool:
    row = entry.result
    ours = entry.place is not None and row.checkpoint != "torchvision"
    return ours and row.eval not in _HIGHER_IS_NOT_BETTER
