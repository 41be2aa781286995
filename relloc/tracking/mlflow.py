"""Sending a run folder to MLflow: what is missing there, once, at any time, again after any crash.

mlflow.json in the run folder notes what was sent where. Before points of a file are sent, the file is
noted as `unsure`, and after them no longer; a file that is still unsure, or a missing note, says that
a sender died half-way, and the store is asked which points it has.
"""

import dataclasses
import hashlib
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from relloc.files import locked
from relloc.results import Result, read_results
from relloc.tracking.addresses import absolute_uri
from relloc.tracking.artifacts import sort_artifacts
from relloc.tracking.experiments import experiment_name, find_or_make_experiment, is_deleted, raise_deleted
from relloc.tracking.journal import JOURNAL_FILE, SYSTEM_FILE, read_journal
from relloc.tracking.note import NOTE_FILE, Note, read_note, write_note
from relloc.tracking.record import (
    RUN_FILE,
    DatasetRecord,
    RunRecord,
    Scalar,
    legal_name,
    now_ms,
    read_status,
)
from relloc.tracking.store import StoreError, open_store, store_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

# MLflow's limits (mlflow.utils.validation, 3.17).
POINTS_A_BATCH = 1000
PARAM_CHARACTERS = 6000
TAG_CHARACTERS = 8000
NAME_CHARACTERS = 250
DIGEST_CHARACTERS = 36

_OF_SPREAD = ("_std", "_min", "_max")
JOURNALS = {"lines": JOURNAL_FILE, "system": SYSTEM_FILE}
POINT_FIELDS = (*JOURNALS, "results")
Point = tuple[str, int, float, int]  # metric name, step, value, Unix ms
Batch = tuple[list[Point], dict[str, Any]]  # points, and what the note says when they are sent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sent:
    """How much a sync sent: params, points (journal and results), artifact files; and to where.

    `refused` has a line for each name in artifacts.json whose file was not sent, and why.
    """

    params: int
    points: int
    artifacts: int
    experiment_id: str
    run_id: str
    refused: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.params or self.points or self.artifacts)


def sync(run_dir: Path, uri: str, experiment: str | None = None) -> Sent:
    """Send what the store lacks of the run folder; twice in a row sends nothing the second time.

    `experiment` is where the run belongs, by default the one that its record names.

    Raises:
        StoreError: the store cannot be reached or written, or refuses; what was sent is noted.
        FileNotFoundError: the folder has no run.json.
        ValueError: a file of the run folder is malformed, or an address or a name can't be used.
    """
    run_dir, uri = run_dir.resolve(), absolute_uri(uri)
    record = RunRecord.read(run_dir)
    name = experiment_name(experiment or record.experiment, uri)
    client = open_store(uri)
    with store_errors(uri), locked(run_dir / f"{NOTE_FILE}.lock"):
        note = _noted_run(client, run_dir, record, uri, name, moves=experiment is not None)
        note, params = _send_record(client, run_dir, record, note)
        points = 0
        for field in JOURNALS:
            note, more = _send_points(client, run_dir, note, field, _journal_batches(run_dir, note, field))
            points += more
        rows = read_results(run_dir)
        note = _unsure_if_rewritten(note, rows)
        note, more = _send_points(client, run_dir, note, "results", _result_batches(rows, note))
        note, artifacts, refused = _send_artifacts(client, run_dir, note)
        note = _send_status(client, run_dir, note)
    return Sent(
        params=params,
        points=points + more,
        artifacts=artifacts,
        experiment_id=note.experiment_id,
        run_id=note.run_id,
        refused=tuple(refused),
    )


def forget(run_dir: Path) -> None:
    """Delete the run of a folder in the store that it was last sent to, if there is one. Raises `StoreError`."""
    if note := read_note(run_dir):
        client = open_store(note.uri)
        with store_errors(note.uri):
            client.delete_run(note.run_id)


def _keep(run_dir: Path, note: Note, **changes: Any) -> Note:
    note = dataclasses.replace(note, **changes)
    write_note(run_dir, note)
    return note


def _noted_run(
    client: "MlflowClient", run_dir: Path, record: RunRecord, uri: str, experiment: str, *, moves: bool
) -> Note:
    """The note of the run that this folder is in the store; it is looked up there, or made, where there is none.

    `moves`: a run that is in another experiment than the one named is not it.
    """
    note = read_note(run_dir)
    if note and (note.uri, note.uid) == (uri, record.uid) and _is_there(client, note, uri, experiment, moves, run_dir):
        return note
    experiment_id = find_or_make_experiment(client, experiment, uri).experiment_id
    found = client.search_runs([experiment_id], f"tags.`relloc.uid` = '{record.uid}'", max_results=1)
    run = found[0] if found else _new_run(client, experiment_id, record)
    note = Note(uri=uri, uid=record.uid, experiment_id=experiment_id, run_id=run.info.run_id)
    return _keep(run_dir, note, unsure=POINT_FIELDS if found else ())


def _is_there(client: "MlflowClient", note: Note, uri: str, experiment: str, moves: bool, run_dir: Path) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(note.run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    deleted = run.info.lifecycle_stage == "deleted"
    if not deleted and not moves:
        return True
    belongs_to = client.get_experiment(run.info.experiment_id)
    if belongs_to.name != experiment and (moves or is_deleted(belongs_to)):
        return False
    if not deleted:
        return True
    if is_deleted(belongs_to):
        raise_deleted(belongs_to, uri)
    raise StoreError(
        f"run {note.run_id} was deleted in {uri}. Restore it with `MLFLOW_TRACKING_URI={uri} mlflow runs restore "
        f"--run-id {note.run_id}`, or remove {run_dir / NOTE_FILE} to send it anew"
    )


def _new_run(client: "MlflowClient", experiment_id: str, record: RunRecord) -> "Run":
    tags = {"relloc.uid": record.uid}
    return client.create_run(experiment_id, record.started_ms, tags=tags, run_name=record.name[:NAME_CHARACTERS])


def _send_record(client: "MlflowClient", run_dir: Path, record: RunRecord, note: Note) -> tuple[Note, int]:
    digest = hashlib.sha256((run_dir / RUN_FILE).read_bytes()).hexdigest()
    if digest == note.record:
        return note, 0
    from mlflow.entities import Param, RunTag

    run = client.get_run(note.run_id)
    params = {legal_name(name): _text(value) for name, value in record.params.items()}
    fresh = {name: text for name, text in params.items() if name not in run.data.params}
    tags = record.tags | {"relloc.uid": record.uid, "relloc.run_dir": str(run_dir)}
    tags |= _source(record.tags) | _changed_params(run.data.params, params)
    client.log_batch(
        note.run_id,
        params=[Param(name, text) for name, text in fresh.items()],
        tags=[RunTag(legal_name(name), text[:TAG_CHARACTERS]) for name, text in tags.items()],
    )
    client.log_inputs(note.run_id, _inputs(record.datasets))
    if run.info.run_name != record.name[:NAME_CHARACTERS]:
        client.update_run(note.run_id, name=record.name[:NAME_CHARACTERS])
    return _keep(run_dir, note, record=digest), len(fresh)


def _text(value: Scalar) -> str:
    return (value if isinstance(value, str) else json.dumps(value))[:PARAM_CHARACTERS]


def _source(tags: dict[str, str]) -> dict[str, str]:
    """What the UI shows as a run's source: its command, and the commit."""
    kind, commit = tags.get("relloc.kind"), tags.get("relloc.commit")
    told = {"mlflow.source.name": f"relloc.{kind}", "mlflow.source.type": "LOCAL"} if kind else {}
    return told | ({"mlflow.source.git.commit": commit} if commit else {})


def _changed_params(old: dict[str, str], new: dict[str, str]) -> dict[str, str]:
    # MLflow never changes a param: a resumed run's other values can only be told in a tag.
    changes = [f"{name}: {old[name]} -> {new[name]}" for name in new if old.get(name, new[name]) != new[name]]
    return {"relloc.changed_params": "; ".join(changes)} if changes else {}


def _inputs(datasets: Iterable[DatasetRecord]) -> list[Any]:
    """One MLflow input per data set; MLflow would drop the second context of the same data."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    by_identity: dict[tuple[str, str], list[DatasetRecord]] = {}
    for dataset in datasets:
        by_identity.setdefault((dataset.name, dataset.digest), []).append(dataset)
    return [
        DatasetInput(
            Dataset(
                name=uses[0].name,
                digest=uses[0].digest[:DIGEST_CHARACTERS],
                source_type="local",
                source=json.dumps({"uri": uses[0].source}),
                profile=json.dumps({"n_images": uses[0].n_images}),
            ),
            [InputTag("mlflow.data.context", ", ".join(dict.fromkeys(use.context for use in uses)))],
        )
        for uses in by_identity.values()
    ]


def _send_points(
    client: "MlflowClient", run_dir: Path, note: Note, field: str, batches: Iterable[Batch]
) -> tuple[Note, int]:
    from mlflow.entities import Metric

    sent, known = 0, None
    for points, changes in batches:
        if known is None:
            known = _points_there(client, note.run_id) if field in note.unsure else set()
            note = _keep(run_dir, note, unsure=sorted({*note.unsure, field}))
        fresh = [point for point in points if _identity(*point[:3]) not in known]
        metrics = [Metric(name, value, time_ms, step) for name, step, value, time_ms in fresh]
        client.log_batch(note.run_id, metrics=metrics)
        note = _keep(run_dir, note, **changes)
        sent += len(fresh)
    if known is not None:
        note = _keep(run_dir, note, unsure=[other for other in note.unsure if other != field])
    return note, sent


def _points_there(client: "MlflowClient", run_id: str) -> set[tuple[str, int, str]]:
    names = client.get_run(run_id).data.metrics
    histories = [client.get_metric_history(run_id, name) for name in names]
    return {_identity(point.key, point.step, point.value) for history in histories for point in history}


def _identity(name: str, step: int, value: float) -> tuple[str, int, str]:
    # Stores keep infinities as the largest number, and nan is not equal to itself.
    largest = sys.float_info.max
    return name, step, "nan" if math.isnan(value) else repr(max(-largest, min(largest, value)))


def _journal_batches(run_dir: Path, note: Note, field: str) -> Iterator[Batch]:
    points: list[Point] = []
    sent = getattr(note, field)
    entries = read_journal(run_dir, sent, JOURNALS[field])
    for line, entry in enumerate(entries, start=sent + 1):
        points += [(legal_name(name), entry.step, v, entry.time_ms) for name, v in entry.metrics.items()]
        if len(points) >= POINTS_A_BATCH or line == sent + len(entries):
            yield points, {field: line}
            points = []


def _unsure_if_rewritten(note: Note, rows: Sequence[Result]) -> Note:
    """Rows that were already sent and now differ (an evaluation was done anew) are all looked at again."""
    if _digest(rows[: note.results]) == note.results_digest or not note.results:
        return note
    return dataclasses.replace(note, results=0, unsure=sorted({*note.unsure, "results"}))


def _result_batches(rows: Sequence[Result], note: Note) -> Iterator[Batch]:
    fresh = rows[note.results :]
    if fresh:
        # Of two values of one name and step MLflow shows the one with the later time.
        points = [point for later, row in enumerate(fresh) for point in _row_points(row, now_ms() + later)]
        yield points, {"results": len(rows), "results_digest": _digest(rows)}


def _row_points(row: Result, time_ms: int) -> list[Point]:
    """A row under its name and as a point of curves: over feature1 to feature5, and over k where it has one.

    Curves of how a number spreads would only hide those of the numbers.
    """
    name = legal_name(row.tracked_name)
    points = [(name, 0, row.value, time_ms)]
    variant, layer, metric = name.rpartition(f"/{row.layer}/")
    if not layer or metric.endswith(_OF_SPREAD):
        return points
    if row.layer.startswith("feature"):
        step = int(row.layer.removeprefix("feature"))
        points.append((f"{variant}/{metric}_by_layer", step, row.value, time_ms))
    if counted := re.fullmatch(r"(\w+?)_k(\d+)(_\w+)?", metric):
        what, k, rest = counted[1], int(counted[2]), counted[3] or ""
        points.append((f"{variant}{layer}{what}{rest}_by_k", k, row.value, time_ms))
    return points


def _digest(rows: Sequence[Result]) -> str:
    return hashlib.sha256(repr([dataclasses.astuple(row) for row in rows]).encode()).hexdigest()


def _send_artifacts(client: "MlflowClient", run_dir: Path, note: Note) -> tuple[Note, int, list[str]]:
    """Send files that are new or changed; a line for each that is not sent, since it can't or must not be."""
    from mlflow.exceptions import MlflowException

    sent, (names, refused) = 0, sort_artifacts(run_dir)
    for name in names:
        about = (run_dir / name).stat()
        mark = [about.st_size, about.st_mtime_ns]
        if note.artifacts.get(name) == mark:
            continue
        folder = PurePosixPath(name).parent
        try:
            client.log_artifact(note.run_id, str(run_dir / name), None if folder.name == "" else str(folder))
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            refused.append(f"{name!r} was not sent: MLflow does not take its name")
            continue
        note = _keep(run_dir, note, artifacts={**note.artifacts, name: mark})
        sent += 1
    return note, sent, refused


def _send_status(client: "MlflowClient", run_dir: Path, note: Note) -> Note:
    status = read_status(run_dir)
    if status is None or status == note.status:
        return note
    if status["status"] in ("RUNNING", "SCHEDULED"):
        client.update_run(note.run_id, status["status"])
    else:
        client.set_terminated(note.run_id, status["status"], status["time_ms"])
    return _keep(run_dir, note, status=status)
