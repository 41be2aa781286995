"""Copies runs out of an MLflow store into run folders, for those who read results on any machine.

What is copied is what reports and notebooks read: run.json, results.jsonl and journal.jsonl.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relloc.results import RESULTS_FILE, Result, append_results, read_results
from relloc.tracking.addresses import absolute_uri
from relloc.tracking.journal import Journal
from relloc.tracking.record import DatasetRecord, RunRecord, Scalar, legal_name
from relloc.tracking.store import open_store, store_errors

# An `mlflow.entities.Run`, whose types declare more to be missing than a store leaves out
Run = Any

if TYPE_CHECKING:
    from mlflow import MlflowClient

_RUN_DIR = "relloc.run_dir"
# Points that are no metrics of training: the load of the machine
_SYSTEM = "system/"
_RUNS_A_PAGE = 1000


def fetch_runs(uri: str, folder: Path) -> dict[str, Path]:
    """Copies all runs of relloc in an MLflow store to folders below `folder`.

    Paths of runs are rewritten to those of the copies, so that results find the run that trained
    their weights. Runs lie as they lay below the folder that all of them share.

    Returns:
        The copy of each run by the path of the run folder that it was sent from.

    Raises:
        StoreError: the store can't be reached or read.
    """
    uri = absolute_uri(uri)
    client = open_store(uri)
    with store_errors(uri):
        runs = _runs(client)
        origins = [run.data.tags[_RUN_DIR] for run in runs]
        if not origins:
            return {}
        # The folder of a single run shares itself with no other
        common = os.path.commonpath([os.path.dirname(origin) for origin in origins])
        copies = {}
        for origin in origins:
            copies[origin] = folder / os.path.relpath(origin, common)
        for run, origin in zip(runs, origins, strict=True):
            _copy(client, run, copies[origin], copies)
    return copies


def _runs(client: "MlflowClient") -> list[Run]:
    """Returns the runs that relloc sent, the oldest first; of one folder the last run counts."""
    by_folder: dict[str, Run] = {}
    experiments = [each.experiment_id for each in client.search_experiments()]
    token = None
    while True:
        page = client.search_runs(
            experiments,
            "tags.`relloc.uid` LIKE '%'",
            max_results=_RUNS_A_PAGE,
            order_by=["attributes.start_time ASC"],
            page_token=token,
        )
        for run in page:
            if _RUN_DIR in run.data.tags:
                by_folder[run.data.tags[_RUN_DIR]] = run
        token = page.token
        if not token:
            return list(by_folder.values())


def _copy(
    client: "MlflowClient",
    run: Run,
    folder: Path,
    copies: Mapping[str, Path],
) -> None:
    """Writes the files of one run to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    _record(run).write(folder)
    rows: list[Result] = []
    # A run that has not ended has no results in the store
    listed = [artifact.path for artifact in client.list_artifacts(run.info.run_id)]
    if RESULTS_FILE in listed:
        file = Path(client.download_artifacts(run.info.run_id, RESULTS_FILE, str(folder)))
        rows = [_moved(row, copies) for row in read_results(file.parent)]
        file.unlink()
        append_results(folder, rows)
    _write_journal(client, run, folder, rows)


def _record(run: Run) -> RunRecord:
    """Returns the record of a run, as run.json had it."""
    params: dict[str, Scalar] = {name: _scalar(text) for name, text in run.data.params.items()}
    datasets = []
    for each in run.inputs.dataset_inputs:
        contexts = {tag.key: tag.value for tag in each.tags}["mlflow.data.context"]
        for context in contexts.split(", "):
            datasets.append(
                DatasetRecord(
                    name=each.dataset.name,
                    context=context,
                    digest=each.dataset.digest,
                    source=json.loads(each.dataset.source)["uri"],
                    n_images=json.loads(each.dataset.profile)["n_images"],
                )
            )
    return RunRecord(
        name=run.info.run_name,
        experiment="fetched",
        tags=dict(run.data.tags),
        params=params,
        datasets=tuple(datasets),
        uid=run.data.tags["relloc.uid"],
        started_ms=run.info.start_time,
    )


def _scalar(text: str) -> Scalar:
    """Returns the value of a param: the store keeps texts alone, numbers as JSON."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, (bool, int, float)) else text


def _moved(row: Result, copies: Mapping[str, Path]) -> Result:
    """Returns a row with the paths of copied runs in place of where these lay."""
    checkpoint = row.checkpoint
    # The weights of a run lie in its folder or one below
    for parent in Path(checkpoint).parents[:2]:
        if str(parent) in copies:
            checkpoint = str(copies[str(parent)] / Path(checkpoint).relative_to(parent))
    measured_in = row.measured_in
    if measured_in in copies:
        measured_in = str(copies[measured_in])
    return dataclasses.replace(row, checkpoint=checkpoint, measured_in=measured_in)


def _write_journal(
    client: "MlflowClient",
    run: Run,
    folder: Path,
    rows: Iterable[Result],
) -> None:
    """Writes the metrics of a run that are not results, in the order of their time and step."""
    of_results = set()
    for row in rows:
        by_layer = f"{row.tracked_eval}/{row.metric}_by_layer"
        by_k = f"{row.tracked_eval}/{row.layer}/{row.series}_by_k"
        of_results |= {legal_name(name) for name in (row.tracked_name, by_layer, by_k)}
    by_moment: dict[tuple[int, int], dict[str, float]] = {}
    for name in run.data.metrics:
        if name in of_results or name.startswith(_SYSTEM):
            continue
        for point in client.get_metric_history(run.info.run_id, name):
            metrics = by_moment.setdefault((point.timestamp, point.step), {})
            metrics[name] = point.value
    journal = Journal(folder)
    for (_, step), metrics in sorted(by_moment.items()):
        journal.log(metrics, step)
