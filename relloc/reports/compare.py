"""Compares our numbers with the published ones.

Each of our numbers gets the line and the group of tables in which it is shown, the published
numbers it stands beside, and whether it is the best of ours.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from relloc.reports.lines import (
    disambiguate,
    group_of,
    image_words,
    label_lines,
    name_images,
)
from relloc.reports.load import Line, Measured, newest
from relloc.reports.published import (
    BEST_LAYER,
    CARD,
    CARD_GROUP,
    CARD_OSS,
    PUBLISHED_MODEL,
    RANDOM,
    SUPERVISED,
    Published,
    accepted,
    foreign_view,
    parts_of,
    published_numbers,
    published_variant,
)
from relloc.results import LAYERS, Result

INSIDE, ABOVE, BELOW = "≈", "+", "\N{MINUS SIGN}"
MARK_WORDS = {INSIDE: "inside", ABOVE: "above", BELOW: "below"}
# The published rows that random and supervised weights are compared with. All other checkpoints are
# compared with the first of CARD and CARD_OSS that has the number
_COMPARED_WITH = {"random": (RANDOM,), "torchvision": (SUPERVISED,)}
_ROUNDING = 1e-9  # slack at the ends of a tolerance, as 51.2 - 1.5 is no binary fraction


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportEntry:
    """One of our numbers, with its place in the report and the published numbers beside it.

    Attributes:
        measured: The result and its run.
        label: The name of its line.
        group: `CARD_GROUP`, or the study, or the name of the other images that it was measured on.
        is_shown: Whether a table shows it; CSV has all numbers.
        compared_with: The published numbers that it is compared with.
        is_best: Whether none of our numbers in its column is better.
        layer_reason: How the layer was chosen, where one was.
        spread: The "std", "min" and "max" over draws, where the evaluation measured them.
    """

    measured: Measured
    label: str
    group: str
    is_shown: bool
    compared_with: tuple[Published, ...] = ()
    is_best: bool = False
    layer_reason: str = ""
    spread: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def result(self) -> Result:
        """The row of results.jsonl that holds the number."""
        return self.measured.result

    @property
    def setting(self) -> str:
        """What distinguishes the number's row from others with the same label.

        It is the variant, and on the card also the view and the images where these are not as
        published. In other groups the title, or a table itself, names view and images.
        """
        row = self.result
        words = [row.variant]
        if self.group == CARD_GROUP:
            words.append(foreign_view(row))
            words.append(self.measured.images)
        return ", ".join(filter(None, words))

    @property
    def fills_card(self) -> bool:
        """Whether the number is one of the card, measured by the published protocol."""
        row = self.result
        # The published nearest-neighbor numbers are those of the last layer
        is_as_published = row.variant in ("", LAYERS[-1]) and not foreign_view(row)
        return (
            self.is_shown
            and self.group == CARD_GROUP
            and row.model == PUBLISHED_MODEL
            and is_as_published
        )

    @property
    def mark(self) -> str:
        """`INSIDE`, `ABOVE` or `BELOW` the tolerance of the published numbers; "" without one."""
        if not self.compared_with:
            return ""
        # With several editions of the published number, from the lowest to the highest
        low, high = accepted(self.compared_with)
        if self.result.value < low - _ROUNDING:
            return BELOW
        if self.result.value > high + _ROUNDING:
            return ABOVE
        return INSIDE


def make_entries(measured: Iterable[Measured]) -> list[ReportEntry]:
    """Returns an entry for each number, in the order of the lines in which tables show them.

    Of numbers that were measured alike only the newest stays.

    Args:
        measured: Our numbers, the oldest first, as `find_measured` returns them.
    """
    # One number for each quantity, with a variant or an image digest where names alone mislead
    results = disambiguate(name_images(newest(measured)))
    labels = label_lines({each.line for each in results})
    order = {line: position for position, line in enumerate(labels)}
    best_layers = [
        each for each in results if each.result.column == BEST_LAYER and not each.result.variant
    ]
    # std, min and max over draws are rows of results.jsonl of their own: join them to their number
    spreads: dict[tuple[object, ...], dict[str, float]] = {}
    for each in results:
        if each.result.spread:
            of_number = spreads.setdefault(_spread_key(each), {})
            of_number[each.result.spread] = each.result.value
    # Sorting keeps the order of the numbers within a line
    entries = []
    for each in sorted(results, key=lambda each: order[each.line]):
        # Spreads are those of the number without a variant
        spread = spreads.get(_spread_key(each), {})
        if each.result.variant:
            spread = {}
        label = labels[each.line]
        entries.append(_entry(each, label, best_layers, spread))
    return _mark_best(entries)


def _spread_key(each: Measured) -> tuple[object, ...]:
    """Returns what a number and its std, min and max over draws have in common."""
    row = each.result
    return (
        each.line,
        row.eval,
        row.layer,
        row.column,
        row.view,
        row.dataset,
        row.split,
        row.n,
        each.images,
    )


def _entry(
    each: Measured,
    label: str,
    best_layers: Sequence[Measured],
    spread: Mapping[str, float],
) -> ReportEntry:
    """Returns the entry of one number; `best_layers` are the best-layer results of all tables."""
    row = each.result
    group = group_of(each)
    # Secondary numbers of an evaluation have no table or no column, and are in CSV alone
    is_shown = bool(row.table and row.column)
    layer_reason = ""
    # Some tables show one layer only, the best of another table (low-shot: that of the full SVM)
    sources = (part.layer_best_in for part in parts_of(row.table) if part.layer_best_in)
    source = next(sources, "")
    if source:
        candidates = [
            one
            for one in best_layers
            if (one.result.table, one.result.view) == (source, row.view)
            and one.line.without_variant == each.line.without_variant
            and group_of(one) == group
        ]
        layer, layer_reason = _layer_to_show(each, candidates)
        is_shown = row.layer == layer
    compared_with: tuple[Published, ...] = ()
    if is_shown and group == CARD_GROUP:
        compared_with = published_beside(each.line, row)
    return ReportEntry(
        measured=each,
        label=label,
        group=group,
        is_shown=is_shown,
        compared_with=compared_with,
        layer_reason=layer_reason,
        spread=spread,
    )


def _layer_to_show(each: Measured, best_layers: Sequence[Measured]) -> tuple[str, str]:
    """Returns the layer at which a table without columns for layers shows a line, and why.

    It is the best layer of the run that measured the number, else the newest of the line
    (`best_layers` has the oldest first), else the layer of the published number.
    """
    same_run = [one for one in best_layers if one.run == each.run]
    if same_run:
        layer = same_run[0].result.layer
        return layer, f"at {layer}, the best layer of the same run"
    if best_layers:
        last = best_layers[-1]
        layer = last.result.layer
        return layer, f"at {layer}, the best layer of run {last.run.name}"
    # Some number of the published row, as all of its table are of one layer
    published = (
        one for one in published_numbers() if (one.row, one.table) == (CARD, each.result.table)
    )
    layer = next(published).layer
    return layer, f"at {layer} as on the published card, no best layer being known"


def published_beside(line: Line, row: Result) -> tuple[Published, ...]:
    """Returns the published numbers that one of our numbers on the card is compared with.

    They are of the published row for the checkpoint, in the same table and column, and of the same
    of two protocols that share a name. There are none for other models, other views of the images,
    and other layers than the published one.
    """
    if line.model != PUBLISHED_MODEL or foreign_view(row):
        return ()
    variant = published_variant(row)
    for name in _COMPARED_WITH.get(line.checkpoint, (CARD, CARD_OSS)):
        numbers = tuple(
            each
            for each in published_numbers()
            if (each.row, each.table, each.column) == (name, row.table, row.column)
            and each.variant == variant
            # A variant that is a layer compares with that layer only
            and (row.variant not in LAYERS or row.variant == each.layer)
        )
        if numbers:
            return numbers
    return ()


def _mark_best(entries: Sequence[ReportEntry]) -> list[ReportEntry]:
    """Returns the entries with `is_best` set where several of our lines compete in a column."""
    values_of: dict[tuple[object, ...], list[float]] = {}
    for each in entries:
        values = values_of.setdefault(_bold_group(each), [])
        values.append(signed_value(each.result))
    # Numbers that compete with none have the empty key
    values_of.pop((), None)
    best = {}
    for group_key, values in values_of.items():
        if len(values) > 1:
            best[group_key] = max(values)
    marked = []
    for each in entries:
        is_best = best.get(_bold_group(each)) == signed_value(each.result)
        marked.append(dataclasses.replace(each, is_best=is_best))
    return marked


def signed_value(row: Result) -> float:
    """Returns the value, with its sign changed where lower is better."""
    return row.value if row.higher_is_better else -row.value


def _bold_group(entry: ReportEntry) -> tuple[object, ...]:
    """Returns a key that numbers share which compete for bold type: same column, same setting.

    The key is empty for numbers that compete with none: those of supervised weights, those that no
    table shows, and those of which neither higher nor lower is better.
    """
    row = entry.result
    if not entry.is_shown or row.checkpoint == "torchvision" or row.higher_is_better is None:
        return ()
    # Layers that are lines of one column compete with each other
    variant = "" if row.variant == row.layer else row.variant
    images = (foreign_view(row), entry.measured.images)
    if entry.group != CARD_GROUP:
        images = tuple(image_words(entry.measured))
    return entry.group, row.table, row.column, variant, images
