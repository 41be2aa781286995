"""Setting apart what looks alike: numbers that were not measured alike never share a row."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from relloc.reports.groups import group_of, view_of
from relloc.reports.labels import short_names
from relloc.reports.measured import Measured, question
from relloc.reports.places import section_title

_DIGITS = 8  # of a digest, as git shows ten of a commit: enough to find it in run.json
_NOT_RECORDED = "images not recorded"


def tell_images_apart(kept: Iterable[Measured]) -> list[Measured]:
    """`kept`, with `images` naming the digest where a data set's name, split and number have several digests."""
    kept = tuple(kept)
    digests: dict[tuple[object, ...], set[str]] = {}
    for each in kept:
        digests.setdefault(_named_alike(each), set()).update(filter(None, [each.digest]))
    return [replace(each, images=_images(each)) if len(digests[_named_alike(each)]) > 1 else each for each in kept]


def _named_alike(each: Measured) -> tuple[object, ...]:
    return each.result.dataset, each.result.split, each.result.n


def _images(each: Measured) -> str:
    return f"images {each.digest[:_DIGITS]}" if each.digest else _NOT_RECORDED


def set_apart(kept: Sequence[Measured]) -> list[Measured]:
    """`kept`, of which those are marked `apart` whose line has several answers to a question of their table.

    Answers differ by fingerprint: by weights, constants, images or seed. The mark is the run's name,
    or its folder where several runs are named alike; a second set of answers of one run is counted.
    """
    tables: dict[tuple[object, ...], list[Measured]] = {}
    for each in kept:
        row = each.result
        tables.setdefault((each.line, section_title(row.eval), group_of(row, each.images), view_of(row)), []).append(
            each
        )
    names = _run_names(kept)
    return [each for table in tables.values() for each in _apart(table, names)]


def _apart(table: Sequence[Measured], names: Mapping[Path, str]) -> Iterable[Measured]:
    if len({question(each) for each in table}) == len(table):
        return table
    answered: dict[Path, list[set[object]]] = {}
    marked = []
    for each in table:
        turns = answered.setdefault(each.run.folder, [set()])
        if question(each) in turns[-1]:
            turns.append(set())
        turns[-1].add(question(each))
        counted = f" ({len(turns)})" if len(turns) > 1 else ""
        marked.append(replace(each, apart=names[each.run.folder] + counted))
    return marked


def _run_names(measured: Iterable[Measured]) -> dict[Path, str]:
    """The name of each run, or the end of its folder where another has that name."""
    name_of = {each.run.folder: each.run.name for each in measured}
    names = list(name_of.values())
    ends = short_names(map(str, name_of))
    return {folder: name if names.count(name) == 1 else ends[str(folder)] for folder, name in name_of.items()}
