"""Lines of tables: their short names, and setting apart what looks alike but was not measured alike."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from relloc.reports.load import Line, Measured
from relloc.reports.published import CARD_GROUP, PUBLISHED_MODEL, is_on_card
from relloc.results import NOT_OURS

RUN_WEIGHTS = "backbone.safetensors"  # as relloc.checkpoints.backbone_files names it, whose import takes seconds
_DIGITS = 8  # of a digest, as git shows ten of a commit: enough to find it in run.json


def group_of(each: Measured) -> str:
    """Which numbers share tables: `CARD_GROUP`, or the data set, split, number of images, and view."""
    row = each.result
    if is_on_card(row):
        return CARD_GROUP
    counted = "pairs" if row.kind == "pretext" else "images"
    words = (f"{row.dataset} {row.split}", f"{row.n:,} {counted}", each.images, row.view)
    return ", ".join(filter(None, words))


def tell_images_apart(kept: Sequence[Measured]) -> list[Measured]:
    """`kept`, with `images` naming the digest where a data set's name, split and number have several digests."""

    def named(each: Measured) -> tuple[object, ...]:
        return each.result.dataset, each.result.split, each.result.n

    digests = Counter(
        name for name, _ in {(named(each), each.digest) for each in kept if each.digest}
    )
    told = []
    for each in kept:
        if digests[named(each)] > 1:
            images = f"images {each.digest[:_DIGITS]}" if each.digest else "images not recorded"
            each = replace(each, images=images)
        told.append(each)
    return told


def set_apart(kept: Sequence[Measured]) -> list[Measured]:
    """`kept`, of which those get a `variant` whose line has several answers to a question of their table.

    Answers differ by fingerprint: by weights, constants, images or seed. The variant is the run's name,
    or its folder where several runs are named alike; a second set of answers of one run is counted.
    """
    names = _run_names(kept)
    tables: dict[tuple[object, ...], list[Measured]] = {}
    for each in kept:
        row = each.result
        tables.setdefault((each.line, row.table or row.eval, group_of(each), row.view), []).append(
            each
        )
    told: list[Measured] = []
    for table in tables.values():
        if len({each.question for each in table}) == len(table):
            told += table
            continue
        answered: dict[Path, list[set[object]]] = {}
        for each in table:
            turns = answered.setdefault(each.run.folder, [set()])
            if each.question in turns[-1]:
                turns.append(set())
            turns[-1].add(each.question)
            counted = f" ({len(turns)})" if len(turns) > 1 else ""
            told.append(replace(each, variant=names[each.run.folder] + counted))
    return told


def _run_names(measured: Iterable[Measured]) -> dict[Path, str]:
    """The name of each run, or the end of its folder where another has that name."""
    name_of = {each.run.folder: each.run.name for each in measured}
    count = Counter(name_of.values())
    ends = short_names(map(str, name_of))
    return {
        folder: name if count[name] == 1 else ends[str(folder)] for folder, name in name_of.items()
    }


def label_lines(lines: Iterable[Line]) -> dict[Line, str]:
    """A short name for each line, no two alike; random and supervised ones first, then by name."""
    lines = set(lines)
    names = short_names({line.checkpoint for line in lines})

    def rank(line: Line) -> tuple[object, ...]:
        name = natural(names[line.checkpoint])
        is_ours = line.checkpoint not in NOT_OURS
        return (
            is_ours,
            name,
            line.model,
            line.seed,
            line.batch_norm,
            line.checkpoint,
            natural(line.variant),
        )

    labels = {}
    for line in sorted(lines, key=rank):
        unusual = [
            word
            for word in (line.model, line.batch_norm)
            if word not in (PUBLISHED_MODEL, "as_trained")
        ]
        variant = [f"run {line.variant}"] if line.variant else []
        labels[line] = ", ".join([names[line.checkpoint], *unusual, f"seed {line.seed}", *variant])
    return labels


def short_names(checkpoints: Iterable[str]) -> dict[str, str]:
    """The shortest end of each path, in whole folders, that no other has; a run folder's backbone is the folder."""
    tails = {
        path: [part for part in Path(path).parts if part != RUN_WEIGHTS] or [path]
        for path in checkpoints
    }
    names = {}
    for path, parts in tails.items():
        n = 1
        while n < len(parts) and sum(other[-n:] == parts[-n:] for other in tails.values()) > 1:
            n += 1
        names[path] = "/".join(parts[-n:])
    return names


def natural(text: str) -> list[tuple[int, str]]:
    """A key that sorts numbers in texts by their size."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]
