"""Loads the results and training curves of all runs as data frames, for the notebooks beside it.

They are read from the run folders, which hold the truth, and not from MLflow, which mirrors it.
"""

import dataclasses
import os
from pathlib import Path

import pandas as pd

from relloc.reports.pretrainings import pretraining_of
from relloc.results import REFERENCE_MODELS, RESULTS_FILE, read_results
from relloc.tracking import RunRecord, read_journal
from relloc.tracking.record import RUN_FILE


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
                pretraining = pretraining_of(record, result.checkpoint)
                study, settings = pretraining.name, pretraining.settings
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
