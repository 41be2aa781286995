from collections.abc import Callable
from pathlib import Path

import pytest

from relloc.results import Result, append_results
from relloc.results_before import convert
from relloc.tracking import RunRecord

NewRun = Callable[..., Path]
NewResult = Callable[..., Result]
COMMIT = "6a6cf28a1b2c3d4e5f60718293a4b5c6d7e8f901"


@pytest.fixture
def result() -> NewResult:
    """A result as the evaluation of that name yields it, on the card's own images; `fields` replace its fields.

    n is the published number of images unless it is given.
    """
    images = {"voc2007": ("test", 4952), "in1k": ("val", 50_000), "places205": ("val", 20_500)}

    def new(
        name: str, layer: str, metric: str, value: float, *, dataset: str = "in1k", checkpoint: str = "random", **fields
    ) -> Result:
        split, n = images.get(dataset, ("val", 300))
        named = {"eval": name, "layer": layer, "metric": metric, "value": value, "checkpoint": checkpoint}
        rest = {"dataset": dataset, "split": split, "n": n, "seed": 0, "model": "resnet50"}
        row = convert({**named, **rest, "protocol": "3.9 as published", "low": None, "high": None})
        row |= {"headline": row.get("headline", metric in ("top1_k20", "map_k16"))}
        row |= {name: tuple(row[name]) for name in ("deviations", "details")}
        return Result(**{**row, **fields})

    return new


@pytest.fixture
def new_run(tmp_path: Path) -> NewRun:
    """A run folder below runs/ that is newer than those made before it."""
    started = 0

    def new(name: str, *rows: Result, commit: str | None = COMMIT) -> Path:
        nonlocal started
        started += 1
        run_dir = tmp_path / "runs" / name
        run_dir.mkdir(parents=True)
        tags = {"relloc.commit": commit} if commit else {}
        RunRecord(name=name, experiment="relloc", tags=tags, started_ms=started).write(run_dir)
        append_results(run_dir, rows)
        return run_dir

    return new
