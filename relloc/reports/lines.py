"""Names the lines of a report's tables, and separates numbers that only look comparable.

Two numbers may have the same line, table and column though they were measured on other images or
with other settings. Such numbers get a variant, so that no table mixes them.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from relloc.checkpoints.paths import BACKBONE_FILE
from relloc.reports.load import Line, Measured
from relloc.reports.published import CARD_GROUP, PUBLISHED_MODEL, is_on_card
from relloc.results import NO_FILES
from relloc.terminal import quantity

_DIGITS = 8  # of a digest, as git shows ten of a commit: enough to find it in run.json


def group_of(each: Measured) -> str:
    """Returns the title of the group of tables that a number belongs to.

    It is `CARD_GROUP`, or the name of a study, whose numbers stand together though some of them may
    be about other images than the rest, or else the images.
    """
    if is_on_card(each.result):
        return CARD_GROUP
    if each.result.kind == "study":
        return f"Study {each.result.eval}"
    return ", ".join(image_words(each))


def image_words(each: Measured) -> list[str]:
    """Returns what says which images a number is about: data set and split, how many, and view."""
    row = each.result
    # The pretext task is evaluated on pairs of patches, of which an image has several
    unit = "pair" if row.kind == "pretext" else "image"
    words = (
        f"{row.dataset} {row.split}",
        quantity(row.n, unit, commas=True),
        each.images,
        row.view,
    )
    return [word for word in words if word]


def name_images(results: Sequence[Measured]) -> list[Measured]:
    """Returns `results` with `images` set where data set, split and count do not
    identify the images.

    That is so where images of one data set, split and count were recorded with several digests:
    `images` then names the number's own digest. A digest covers annotations, which fine-tuned
    evaluations of the same images may read differently, so that only numbers of one such
    evaluation, measured in one way, are held against each other.
    """

    def image_set(each: Measured) -> tuple[object, ...]:
        row = each.result
        evaluation = (row.eval, row.variant) if row.kind == "fine-tuned" else ()
        return row.dataset, row.split, row.n, evaluation

    # A digest counts once, however many numbers were measured on it
    recorded = {(image_set(each), each.digest) for each in results if each.digest}
    digest_count = Counter(name for name, _ in recorded)
    named = []
    for each in results:
        if digest_count[image_set(each)] > 1:
            digest = each.digest[:_DIGITS] or "not recorded"
            each = replace(each, images=f"images {digest}")
        named.append(each)
    return named


def disambiguate(results: Sequence[Measured]) -> list[Measured]:
    """Returns `results` with a `variant` where a line has several measurements of one quantity.

    They differ by fingerprint: by weights, hyperparameters, images or seed. The variant is the
    run's name, or its folder where several runs have the same name. A run that has several
    measurements itself gets one counted variant for each: `name`, `name (2)`.
    """
    names = _run_names(results)
    # Lines are compared within a table, so all numbers of a line there should be made the same way
    tables: dict[tuple[object, ...], list[Measured]] = {}
    for each in results:
        row = each.result
        # A table of a study has numbers in several views, which belong to one measurement
        view = "" if row.kind == "study" else row.view
        key = (
            each.line,
            row.table or row.eval,
            group_of(each),
            view,
        )
        tables.setdefault(key, []).append(each)
    separated: list[Measured] = []
    for table in tables.values():
        if len({each.quantity for each in table}) == len(table):
            # One measurement of each quantity: nothing to separate, though runs may differ
            separated += table
            continue
        # The quantities that each run has measured, in sets of which none has a quantity twice
        measured: dict[Path, list[set[object]]] = {}
        for each in table:
            quantity_sets = measured.setdefault(each.run.folder, [set()])
            if each.quantity in quantity_sets[-1]:
                quantity_sets.append(set())
            quantity_sets[-1].add(each.quantity)
            count = f" ({len(quantity_sets)})" if len(quantity_sets) > 1 else ""
            variant = names[each.run.folder] + count
            separated.append(replace(each, variant=variant))
    return separated


def _run_names(results: Iterable[Measured]) -> dict[Path, str]:
    """Returns the name of each run, or the end of its folder where another run has that name."""
    name_of = {each.run.folder: each.run.name for each in results}
    count = Counter(name_of.values())
    folder_names = short_names(map(str, name_of))
    unique = {}
    for folder, name in name_of.items():
        unique[folder] = name
        if count[name] > 1:
            unique[folder] = folder_names[str(folder)]
    return unique


def label_lines(lines: Iterable[Line]) -> dict[Line, str]:
    """Returns a short name for each line, no two alike, in the order in which tables show them.

    Random and supervised weights stand first, then checkpoints by name. Model, batch norm and the
    decoder of JPEGs are named only where they are not those of the card.

    Example:
        A label in full is "run9, small, recalibrated, seed 1, run gaps", and the usual one is
        "run9, seed 0".
    """
    lines = set(lines)
    names = short_names({line.checkpoint for line in lines})

    def rank(line: Line) -> tuple[object, ...]:
        return (
            line.checkpoint not in NO_FILES,
            natural_sort_key(names[line.checkpoint]),
            line.model,
            line.seed,
            line.batch_norm,
            line.decoder,
            line.checkpoint,
            natural_sort_key(line.variant),
        )

    # What is usual is left out of a name
    labels = {}
    for line in sorted(lines, key=rank):
        words = [names[line.checkpoint]]
        # A person has no model
        if line.model not in (PUBLISHED_MODEL, ""):
            words.append(line.model)
        if line.batch_norm != "as_trained":
            words.append(line.batch_norm)
        if line.decoder:
            words.append(line.decoder)
        words.append(f"seed {line.seed}")
        if line.variant:
            words.append(f"run {line.variant}")
        labels[line] = ", ".join(words)
    return labels


def short_names(checkpoints: Iterable[str]) -> dict[str, str]:
    """Returns for each path its shortest end, in whole folders, that no other path has.

    The backbone of a run folder is named as the folder.

    Example:
        >>> short_names(["/a/x/backbone.safetensors", "/b/x/backbone.safetensors", "w/y.pth"])
        {'/a/x/backbone.safetensors': 'a/x', '/b/x/backbone.safetensors': 'b/x', 'w/y.pth': 'y.pth'}
    """
    parts_of = {}
    for path in checkpoints:
        parts = [part for part in Path(path).parts if part != BACKBONE_FILE]
        parts_of[path] = parts or [path]
    names = {}
    for path, parts in parts_of.items():
        # Take one folder more until only this path ends like this
        n = 1
        while n < len(parts):
            same_end = sum(other[-n:] == parts[-n:] for other in parts_of.values())
            if same_end == 1:
                break
            n += 1
        names[path] = "/".join(parts[-n:])
    return names


def natural_sort_key(text: str) -> list[tuple[int, str]]:
    """Returns a sort key by which numbers in texts are sorted by size: run9 before run10."""
    # Pairs, so that numbers and words are never compared with each other
    key = []
    for piece in re.split(r"(\d+)", text):
        if piece.isdigit():
            key.append((int(piece), ""))
        else:
            key.append((-1, piece))
    return key
