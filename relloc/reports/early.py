"""Collects measures taken early in trainings, to see which foretells the accuracies at the end.

They come from the monitors of a training, in journal.jsonl, and from evaluations of its checkpoints
while it went on, in watched.jsonl.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from relloc.reports.load import find_watched
from relloc.reports.observations import (
    PRETEXT,
    Observations,
    Quantity,
    is_accuracy,
    is_measure,
    means_over_seeds,
    quantity_of,
)
from relloc.reports.pretrainings import is_training
from relloc.results import decoder_name
from relloc.tracking import read_journal
from relloc.tracking.journal import Entry
from relloc.tracking.record import RUN_FILE, RunRecord
from relloc.tracking.unfinished import planned_steps

EARLY = 0.1  # part of the training
# Of each measure the value closest to `EARLY` counts, if it lies between these parts
_FROM, _TO = 0.05, 0.15
# What monitors measure (`relloc.runs.monitors`), by the word in the names of curves
_MEASURES = {"pretext": PRETEXT, "rankme": "RankMe", "alpha_req": "alpha-ReQ", "knn": "kNN"}

# The values of one quantity in a training, by step and by the seed of the evaluation
_Curves = dict[Quantity, dict[tuple[int, int], float]]


def early_observations(final: Observations) -> Observations:
    """Returns measures after a tenth of the trainings, with the accuracies at their end.

    Accuracies are measures here, too, as nearest neighbors after a tenth may foretell a linear
    probe at the end. Weights whose training is not there, or that have nothing between 5 and 15 %
    of its steps, have no measures.

    Args:
        final: What was observed of the weights at the end.

    Raises:
        DataError: A file of a training is broken.
    """
    measures: dict[Quantity, dict[tuple[str, int], float]] = defaultdict(dict)
    for weights in final.points:
        folder = Path(weights).parent
        if not (folder / RUN_FILE).exists():
            continue
        record = RunRecord.read(folder)
        if not is_training(record):
            continue
        journal = read_journal(folder)
        steps = planned_steps(record, journal)
        if not steps:
            continue
        for quantity, values in {**_watched(folder), **_monitored(journal, record)}.items():
            early = dataclasses.replace(quantity, progress=EARLY)
            for seed, value in _early_values(values, steps).items():
                measures[early][weights, seed] = value
    return Observations(
        points=final.points,
        measures=means_over_seeds(measures),
        accuracies=final.accuracies,
    )


def _early_values(values: Mapping[tuple[int, int], float], steps: int) -> dict[int, float]:
    """Returns for each seed the value closest to a tenth of the steps, if one is close."""
    found: dict[int, float] = {}
    # Closer ones come later, and replace those before.
    for step, seed in sorted(values, key=lambda key: -abs(key[0] - EARLY * steps)):
        if _FROM <= step / steps <= _TO:
            found[seed] = values[step, seed]
    return found


def _watched(folder: Path) -> _Curves:
    """Returns measures and accuracies of a training's checkpoints."""
    curves: _Curves = defaultdict(dict)
    for step, each in find_watched(folder):
        row = each.result
        quantity = quantity_of(each)
        if is_accuracy(row):
            # Unlike measures without labels it is not known by its metric alone.
            words = (f"{row.eval}/{row.metric}", quantity.variant)
            quantity = dataclasses.replace(quantity, variant=", ".join(filter(None, words)))
        elif not is_measure(row):
            continue
        curves[quantity][step, row.seed] = row.value
    return curves


def _monitored(journal: Sequence[Entry], record: RunRecord) -> _Curves:
    """Returns what the monitors of a training measured."""
    curves: _Curves = defaultdict(dict)
    for entry in journal:
        for name, value in entry.metrics.items():
            # Features that define no measure have nan.
            if not name.startswith("monitor/") or not math.isfinite(value):
                continue
            quantity = _quantity_of_monitor(name, record)
            if quantity:
                curves[quantity][entry.step, 0] = value
    return curves


def _quantity_of_monitor(name: str, record: RunRecord) -> Quantity | None:
    """Returns what a monitor measures, or None for accuracies of single positions.

    `name` is that of its curve, such as `monitor/knn/feature4/top1_k20`.
    """
    _, measure, *rest = name.split("/")
    is_pretext = measure == "pretext"
    is_of_position = is_pretext and rest != ["top1"]
    if measure not in _MEASURES or is_of_position:
        return None
    layer = "" if is_pretext else rest[0]
    is_neighbors = measure == "knn"
    # The training's own images come first among those that it recorded.
    held_out = [each for each in record.datasets if each.context == "eval"][:1]
    n_images = int(record.params.get("monitor.images", 0))
    dataset = split = images = ""
    for each in held_out:
        dataset, _, split = each.name.rpartition("-")
        images = each.digest
        n_images = min(n_images, each.n_images)
    words = [_MEASURES[measure], rest[-1] if is_neighbors else "", "of monitors"]
    return Quantity(
        eval="monitor",
        kind="monitor",
        metric=measure,
        variant=" ".join(filter(None, words)),
        layer=layer,
        dataset=dataset,
        split=split,
        images=images,
        n=n_images,
        model=str(record.params.get("model.name", "")),
        batch_norm="as_trained",
        view="",
        precision="",
        protocol="",
        # Crops that pretext accuracy is measured on are decoded on the CPU in any case.
        decoder="" if is_pretext else _decoder(record),
    )


def _decoder(record: RunRecord) -> str:
    """Returns the decoder of the JPEGs that a training looked at, as in a `Result`."""
    decode = str(record.params.get("decode", "cpu"))
    # Runs name their GPUs, or the CPU.
    on_gpu = record.tags.get("devices", "cpu") != "cpu"
    return decoder_name(decode, on_gpu=on_gpu)
