"""Sending a run folder to MLflow: what is missing there, once, at any time, again after any crash.

mlflow.json in the run folder notes what was sent where. Before points are sent, the note says that it is `unsure`, and
after them no longer; a note that is unsure or missing says that a sender died half-way, and the store is asked which
points it has.
"""

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from relloc.files import locked
from relloc.results import LAYERS, Result, read_results
from relloc.status import Status
from relloc.tracking.addresses import absolute_uri
from relloc.tracking.artifacts import sort_artifacts
from relloc.tracking.experiments import (
    experiment_name,
    find_or_make_experiment,
    is_deleted,
    raise_deleted,
)
from relloc.tracking.journal import JOURNAL_FILE, SYSTEM_FILE, read_journal
from relloc.tracking.note import NOTE_FILE, Note, read_note, write_note
from relloc.tracking.record import (
    RUN_FILE,
    DatasetRecord,
    RunRecord,
    legal_name,
    now_ms,
    read_status,
)
from relloc.tracking.store import StoreError, open_store, store_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

# MLflow's limits (mlflow.utils.validation, 3.17).
POINTS_A_BATCH = 1000
PARAM_CHARACTERS = 6000
TAG_CHARACTERS = 8000
NAME_CHARACTERS = 250
DIGEST_CHARACTERS = 36

Batch = tuple[list["Metric"], dict[str, Any]]  # points, and what the note says when they are sent


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


@dataclasses.dataclass
class _Sending:
    """One run folder on its way to one store."""

    client: "MlflowClient"
    uri: str
    run_dir: Path
    record: RunRecord
    note: Note

    def update_note(self, **changes: Any) -> None:
        self.note = dataclasses.replace(self.note, **changes)
        write_note(self.run_dir, self.note)


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
        note = read_note(run_dir) or Note(uri="", uid="", experiment_id="", run_id="")
        sending = _Sending(client, uri, run_dir, record, note)
        _find_run(sending, name, moves=experiment is not None)
        params = _send_record(sending)
        points = _send_points(sending)
        artifacts, refused = _send_artifacts(sending)
        _send_status(sending)
    return Sent(
        params=params,
        points=points,
        artifacts=artifacts,
        experiment_id=sending.note.experiment_id,
        run_id=sending.note.run_id,
        refused=tuple(refused),
    )


def forget(run_dir: Path) -> None:
    """Delete the run of a folder in the store that it was last sent to, if there is one. Raises `StoreError`."""
    if note := read_note(run_dir):
        client = open_store(note.uri)
        with store_errors(note.uri):
            client.delete_run(note.run_id)


def _find_run(sending: _Sending, experiment: str, *, moves: bool) -> None:
    """Note which run of the store this folder is; where the note does not say it is looked up, or made.

    `moves`: a run that is in another experiment than the one named is not it.
    """
    client, record, note = sending.client, sending.record, sending.note
    if (note.uri, note.uid) == (sending.uri, record.uid) and _is_there(sending, experiment, moves):
        return
    experiment_id = find_or_make_experiment(client, experiment, sending.uri).experiment_id
    found = client.search_runs(
        [experiment_id], f"tags.`relloc.uid` = '{record.uid}'", max_results=1
    )
    if found:
        run = found[0]
    else:
        tags, run_name = {"relloc.uid": record.uid}, record.name[:NAME_CHARACTERS]
        run = client.create_run(experiment_id, record.started_ms, tags=tags, run_name=run_name)
    sending.note = Note(
        uri=sending.uri, uid=record.uid, experiment_id=experiment_id, run_id=run.info.run_id
    )
    sending.update_note(unsure=bool(found))


def _is_there(sending: _Sending, experiment: str, moves: bool) -> bool:
    from mlflow.exceptions import MlflowException

    client, uri, note = sending.client, sending.uri, sending.note
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
        f"--run-id {note.run_id}`, or remove {sending.run_dir / NOTE_FILE} to send it anew"
    )


def _send_record(sending: _Sending) -> int:
    """Send what the run is, where that changed; how many params are new."""
    from mlflow.entities import Param, RunTag

    client, record, note = sending.client, sending.record, sending.note
    digest = hashlib.sha256((sending.run_dir / RUN_FILE).read_bytes()).hexdigest()
    if digest == note.record:
        return 0
    before = client.get_run(note.run_id).data.params
    texts = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in record.params.items()
    }
    params = {legal_name(name): text[:PARAM_CHARACTERS] for name, text in texts.items()}
    fresh = [Param(name, text) for name, text in params.items() if name not in before]
    tags = record.tags | {"relloc.uid": record.uid, "relloc.run_dir": str(sending.run_dir)}
    # What the UI shows as a run's source: its command, and the commit
    if kind := record.tags.get("relloc.kind"):
        tags |= {"mlflow.source.name": f"relloc.{kind}", "mlflow.source.type": "LOCAL"}
    if commit := record.tags.get("relloc.commit"):
        tags["mlflow.source.git.commit"] = commit
    # MLflow never changes a param: a resumed run's other values can only be told in a tag.
    changes = [
        f"{name}: {old} -> {params[name]}"
        for name, old in before.items()
        if params.get(name, old) != old
    ]
    if changes:
        tags["relloc.changed_params"] = "; ".join(changes)
    client.log_batch(
        note.run_id,
        params=fresh,
        tags=[RunTag(legal_name(name), text[:TAG_CHARACTERS]) for name, text in tags.items()],
    )
    client.log_inputs(note.run_id, _inputs(record.datasets))
    client.update_run(note.run_id, name=record.name[:NAME_CHARACTERS])
    sending.update_note(record=digest)
    return len(fresh)


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
            [
                InputTag(
                    "mlflow.data.context", ", ".join(dict.fromkeys(use.context for use in uses))
                )
            ],
        )
        for uses in by_identity.values()
    ]


def _send_points(sending: _Sending) -> int:
    """Send the points of the journals and of the results that the store lacks; how many these are."""
    doubt = sending.note.unsure
    sent = _send_batches(sending, _journal_batches(sending), doubt)
    rows = read_results(sending.run_dir)
    # An evaluation that was done anew may have changed rows that were sent: then all are looked at again.
    first = sending.note.results
    changed = first > 0 and _digest(rows[:first]) != sending.note.results_digest
    fresh = rows if changed else rows[first:]
    if fresh:
        # Of two values of one name and step MLflow shows the one with the later time.
        points = [
            point for later, row in enumerate(fresh) for point in _row_points(row, now_ms() + later)
        ]
        batch = points, {"results": len(rows), "results_digest": _digest(rows)}
        sent += _send_batches(sending, [batch], doubt or changed)
    if sending.note.unsure:
        sending.update_note(unsure=False)
    return sent


def _send_batches(sending: _Sending, batches: Iterable[Batch], doubt: bool) -> int:
    """Send points, where in `doubt` only those that the store has not; how many were sent."""
    client, run_id = sending.client, sending.note.run_id
    sent, known = 0, None
    for points, changes in batches:
        if known is None:
            names = client.get_run(run_id).data.metrics if doubt else ()
            known = {
                _identity(point)
                for name in names
                for point in client.get_metric_history(run_id, name)
            }
        sending.update_note(unsure=True)
        fresh = [point for point in points if _identity(point) not in known]
        client.log_batch(run_id, metrics=fresh)
        sending.update_note(unsure=doubt, **changes)
        sent += len(fresh)
    return sent


def _identity(point: "Metric") -> tuple[str, int, str]:
    # Stores keep infinities as the largest number, and nan is not equal to itself.
    largest = sys.float_info.max
    value = "nan" if math.isnan(point.value) else repr(max(-largest, min(largest, point.value)))
    return point.key, point.step, value


def _journal_batches(sending: _Sending) -> Iterator[Batch]:
    from mlflow.entities import Metric

    for field, file in (("lines", JOURNAL_FILE), ("system", SYSTEM_FILE)):
        first = getattr(sending.note, field)
        entries = read_journal(sending.run_dir, first, file)
        points: list[Metric] = []
        for line, entry in enumerate(entries, start=first + 1):
            points += [
                Metric(legal_name(name), v, entry.time_ms, entry.step)
                for name, v in entry.metrics.items()
            ]
            if len(points) >= POINTS_A_BATCH or line == first + len(entries):
                yield points, {field: line}
                points = []


def _row_points(row: Result, time_ms: int) -> list["Metric"]:
    """A row under its name and as a point of curves: over feature1 to feature5, and over k where it has one.

    Curves of how a number spreads would only hide those of the numbers.
    """
    from mlflow.entities import Metric

    steps = {row.tracked_name: 0}
    if row.layer and not row.spread:
        if row.layer != "avgpool":
            steps[f"{row.tracked_eval}/{row.metric}_by_layer"] = LAYERS.index(row.layer) + 1
        if row.k is not None:
            steps[f"{row.tracked_eval}/{row.layer}/{row.series}_by_k"] = row.k
    return [Metric(legal_name(name), row.value, time_ms, step) for name, step in steps.items()]


def _digest(rows: Sequence[Result]) -> str:
    return hashlib.sha256(repr([dataclasses.astuple(row) for row in rows]).encode()).hexdigest()


def _send_artifacts(sending: _Sending) -> tuple[int, list[str]]:
    """Send files that are new or changed; a line for each that is not sent, since it can't or must not be."""
    from mlflow.exceptions import MlflowException

    run_dir, sent, (names, refused) = sending.run_dir, 0, sort_artifacts(sending.run_dir)
    for name in names:
        about = (run_dir / name).stat()
        version = [about.st_size, about.st_mtime_ns]
        if sending.note.artifacts.get(name) == version:
            continue
        folder = str(PurePosixPath(name).parent)
        try:
            sending.client.log_artifact(
                sending.note.run_id, str(run_dir / name), None if folder == "." else folder
            )
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            refused.append(f"{name!r} was not sent: MLflow does not take its name")
            continue
        sending.update_note(artifacts={**sending.note.artifacts, name: version})
        sent += 1
    return sent, refused


def _send_status(sending: _Sending) -> None:
    now = read_status(sending.run_dir)
    if now is None or dataclasses.asdict(now) == sending.note.status:
        return
    if now.status in (Status.RUNNING, Status.WAITING):
        sending.client.update_run(sending.note.run_id, now.status)
    else:
        sending.client.set_terminated(sending.note.run_id, now.status, now.time_ms)
    sending.update_note(status=dataclasses.asdict(now))
