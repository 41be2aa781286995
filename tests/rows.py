"""Results as evaluations yield them, for tests that have none measured."""

from typing import Any

from relloc.results import Result
from relloc.results_before import convert

_IMAGES = {"voc2007": ("test", 4952), "in1k": ("val", 50_000), "places205": ("val", 20_500)}


def result(
    name: str,
    layer: str,
    metric: str,
    value: float,
    *,
    dataset: str = "in1k",
    checkpoint: str = "random",
    **fields: Any,
) -> Result:
    """A result as the named evaluation yields it on the card's images; `fields` replace its fields.

    n is the published number of images unless it is given.
    """
    split, n = _IMAGES.get(dataset, ("val", 300))
    named = {
        "eval": name,
        "layer": layer,
        "metric": metric,
        "value": value,
        "checkpoint": checkpoint,
    }
    rest = {"dataset": dataset, "split": split, "n": n, "seed": 0, "model": "resnet50"}
    row = convert({**named, **rest, "protocol": "3.9 as published"})
    row |= {"headline": row.get("headline") or metric in ("top1_k20", "map_k16")}
    row |= {name: tuple(row[name]) for name in ("deviations", "details")}
    return Result(**{**row, **fields})
