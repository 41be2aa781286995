"""Loads the results and training curves of all runs as data frames, for the notebooks beside it.

They are read from the run folders, which hold the truth, and not from MLflow, which mirrors it.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import pandas as pd

from relloc import neutral
from relloc.reports.lines import RUN_WEIGHTS
from relloc.results import REFERENCE_MODELS, RESULTS_FILE, read_results
from relloc.tracking import RunRecord, read_journal
from relloc.tracking.record import RUN_FILE

_HASH_DIGITS = 8


def runs_folder() -> Path:
    """Returns the folder of runs: RELLOC_RUNS, or runs/ here or in the folder above."""
    if "RELLOC_RUNS" in os.environ:
        return Path(os.environ["RELLOC_RUNS"])
    # Jupyter starts in analysis/, a script where the command was given
    candidates = (Path("runs"), Path("../runs"))
    return next((path for path in candidates if path.is_dir()), Path("runs"))


def load_results(runs: Path) -> pd.DataFrame:
    """Returns a data frame with a row for each result of all runs below a folder.

    Its columns are the fields of `Result` and:
        run, folder: Name and folder of the run that has the result.
        weights: "random", "torchvision" or "pretrained".
        study: The name of the pretraining without its seed, so that repeats share it; for other
            weights the same as `weights`.
        settings: A hash of the pretraining's settings without the seed, as two studies may have
            the same name.

    Raises:
        FileNotFoundError: No run below `runs` has results.
    """
    rows = []
    for file in sorted(runs.rglob(RESULTS_FILE)):
        folder = file.parent
        # MLflow's copies of results lie in folders without a run record
        if not (folder / RUN_FILE).exists():
            continue
        record = RunRecord.read(folder)
        for result in read_results(folder):
            if result.checkpoint in REFERENCE_MODELS:
                weights = result.checkpoint
                study, settings = weights, ""
            else:
                weights = "pretrained"
                study, settings = _study(record, result.checkpoint)
            row = dataclasses.asdict(result)
            row["run"] = record.name
            row["study"] = study
            row["settings"] = settings
            row["folder"] = str(folder)
            row["weights"] = weights
            rows.append(row)
    if not rows:
        raise FileNotFoundError(
            f"no {RESULTS_FILE} below {runs.resolve()}: "
            "run python -m relloc.train, or set RELLOC_RUNS"
        )
    return pd.DataFrame(rows)


def _study(record: RunRecord, checkpoint: str) -> tuple[str, str]:
    """Returns the name of a checkpoint's study and the hash of its settings, "" if not known.

    Args:
        record: The record of the run that has the result.
        checkpoint: The evaluated file.
    """
    # A pretraining evaluates its own weights
    if record.tags.get("relloc.kind") == "train":
        return _without_seed(record)
    # A run's backbone lies in its folder, and its checkpoints one folder below
    file = Path(checkpoint)
    for folder in file.parents[:2]:
        if (folder / RUN_FILE).exists():
            name, settings = _without_seed(RunRecord.read(folder))
            is_backbone = folder == file.parent
            return name if is_backbone else f"{name} {file.stem}", settings
    # The file of another project, or of a run that is gone
    return file.parent.name if file.name == RUN_WEIGHTS else file.stem, ""


def _without_seed(record: RunRecord) -> tuple[str, str]:
    """Returns a pretraining's name and the hash of its settings, both without the seed."""
    settings = neutral.settings_of_weights(record.params)
    # Names of runs have the seed as a word, such as s0
    seed_word = f"s{settings.pop('seed', 0)}"
    words = [word for word in record.name.split(" ") if word != seed_word]
    text = json.dumps(settings, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return " ".join(words), digest[:_HASH_DIGITS]


def load_curves(runs: Path) -> pd.DataFrame:
    """Returns a data frame with a row for each metric and step in the journals of all runs.

    Its columns are `run` (the run's folder relative to `runs`), `step`, `metric` and `value`.

    Raises:
        FileNotFoundError: No run below `runs` has a journal with metrics.
    """
    rows = []
    for folder in sorted(file.parent for file in runs.rglob(RUN_FILE)):
        run = str(folder.relative_to(runs))
        for entry in read_journal(folder):
            for metric, value in entry.metrics.items():
                rows.append(
                    {
                        "run": run,
                        "step": entry.step,
                        "metric": metric,
                        "value": value,
                    }
                )
    if not rows:
        raise FileNotFoundError(
            f"no curves below {runs.resolve()}: run python -m relloc.train, or set RELLOC_RUNS"
        )
    return pd.DataFrame(rows)
