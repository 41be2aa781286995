"""Results and curves of all runs as one table each, read from the run folders: the truth, not its mirror."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import pandas as pd

from relloc import neutral
from relloc.reports.lines import RUN_WEIGHTS
from relloc.results import NOT_OURS, RESULTS_FILE, read_results
from relloc.tracking import RunRecord, read_journal
from relloc.tracking.record import RUN_FILE


def runs_folder() -> Path:
    """Where the commands put their run folders: RELLOC_RUNS, or runs/ here or in the folder above."""
    if "RELLOC_RUNS" in os.environ:
        return Path(os.environ["RELLOC_RUNS"])
    return next((path for path in (Path("runs"), Path("../runs")) if path.is_dir()), Path("runs"))


def load_results(runs: Path) -> pd.DataFrame:
    """A row a result, with the run's name and folder; `weights` is "random", "torchvision" or "pretrained".

    `study` is the pretraining that the weights are of, by its name without the seed; or `weights`. `settings` is a
    hash of its settings but the seed: two studies may be called alike.

    Raises:
        FileNotFoundError: no run below `runs` has results.
    """
    rows = []
    for file in sorted(runs.rglob(RESULTS_FILE)):
        if not (file.parent / RUN_FILE).exists():
            continue  # a tracker's copy
        record = RunRecord.read(file.parent)
        for result in read_results(file.parent):
            weights = result.checkpoint if result.checkpoint in NOT_OURS else "pretrained"
            study, settings = (
                _study(record, result.checkpoint) if weights == "pretrained" else (weights, "")
            )
            told = {
                "study": study,
                "settings": settings,
                "folder": str(file.parent),
                "weights": weights,
            }
            rows.append(dataclasses.asdict(result) | {"run": record.name} | told)
    if not rows:
        raise FileNotFoundError(
            f"no {RESULTS_FILE} below {runs.resolve()}: run python -m relloc.train, or set RELLOC_RUNS"
        )
    return pd.DataFrame(rows)


def _study(record: RunRecord, checkpoint: str) -> tuple[str, str]:
    """The study that a checkpoint is of, and the hash of its settings, "" where they are not known."""
    if record.tags.get("relloc.kind") == "train":
        return _without_seed(record)
    file = Path(checkpoint)
    for folder in file.parents[:2]:  # a run's backbone, or one of its checkpoints
        if (folder / RUN_FILE).exists():
            name, settings = _without_seed(RunRecord.read(folder))
            return name if folder == file.parent else f"{name} {file.stem}", settings
    return file.parent.name if file.name == RUN_WEIGHTS else file.stem, ""


def _without_seed(record: RunRecord) -> tuple[str, str]:
    """A pretraining's name without the word of its seed, and the hash of its settings but the seed."""
    settings = neutral.settings_of_weights(record.params)
    word = f"s{settings.pop('seed', 0)}"
    name = " ".join(part for part in record.name.split(" ") if part != word)
    return name, hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def load_curves(runs: Path) -> pd.DataFrame:
    """A row a metric and step of each run's journal, with the run's folder below `runs`.

    Raises:
        FileNotFoundError: no run below `runs` has a journal with metrics.
    """
    folders = sorted(file.parent for file in runs.rglob(RUN_FILE))
    rows = [
        {"run": str(folder.relative_to(runs)), "step": entry.step, "metric": metric, "value": value}
        for folder in folders
        for entry in read_journal(folder)
        for metric, value in entry.metrics.items()
    ]
    if not rows:
        raise FileNotFoundError(
            f"no curves below {runs.resolve()}: run python -m relloc.train, or set RELLOC_RUNS"
        )
    return pd.DataFrame(rows)
