"""Sends a run folder to MLflow: whatever the store lacks, exactly once, even after a crash.

The file mlflow.json in the run folder, called the note (`relloc.tracking.note`), records what was
sent to which store. MLflow does not deduplicate: a metric point that is sent twice is stored twice.
So the note is marked `unsure` before points are sent, and the mark is cleared afterwards. Where the
note is marked or missing, a sender may have died half-way; then the store itself is asked which
points it has, and only the others are sent.
"""

import dataclasses
import functools
import hashlib
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from relloc.tracking.watched import watched_entries

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

# MLflow's limits (mlflow.utils.validation, 3.17).
POINTS_A_BATCH = 1000
PARAM_CHARACTERS = 6000
TAG_CHARACTERS = 8000
NAME_CHARACTERS = 250
DIGEST_CHARACTERS = 36

# Metric points that are sent together, and the fields of the note to change once they have arrived.
PointBatch = tuple[list["Metric"], dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyncCounts:
    """Counts of what one `sync` sent, and the MLflow run that it was sent to.

    Attributes:
        params: parameters that the store did not have.
        points: metric points, from the journals and from the results.
        artifacts: files.
        experiment_id: MLflow's id of the experiment.
        run_id: MLflow's id of the run.
        refused: a sentence for each name in artifacts.json whose file was not sent, with the
            reason.

    It is true if anything was sent.
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
class _SyncState:
    """The state that the steps of one `sync` share: run folder, record, store and note."""

    client: "MlflowClient"
    uri: str
    run_dir: Path
    record: RunRecord
    note: Note

    def update_note(self, **changes: Any) -> None:
        """Changes fields of the note, here and at once in the file, so that a crash loses none."""
        self.note = dataclasses.replace(self.note, **changes)
        write_note(self.run_dir, self.note)


def sync(run_dir: Path, uri: str, experiment: str | None = None) -> SyncCounts:
    """Sends what the store lacks of a run folder. A second call in a row sends nothing.

    Example: `sync(Path("runs/one"), "sqlite:////data/mlflow.db")`

    Args:
        run_dir: the run folder.
        uri: the address of the store, as `absolute_uri` takes it.
        experiment: the experiment that the run belongs to; by default the one named in run.json.

    Raises:
        StoreError: the store can't be reached or written, or refuses; what arrived is noted.
        FileNotFoundError: the folder has no run.json.
        ValueError: a file of the run folder is malformed, or an address or a name can't be used.
    """
    run_dir = run_dir.resolve()
    uri = absolute_uri(uri)
    record = RunRecord.read(run_dir)
    name = experiment_name(experiment or record.experiment, uri)
    client = open_store(uri)
    # The lock keeps a run's own mirror and a `relloc.sync` from sending the same points at once.
    with store_errors(uri), locked(run_dir / f"{NOTE_FILE}.lock"):
        note = read_note(run_dir) or Note(uri="", uid="", experiment_id="", run_id="")
        state = _SyncState(client, uri, run_dir, record, note)
        _find_run(state, name, moves=experiment is not None)
        params = _send_record(state)
        points = _send_points(state)
        artifacts, refused = _send_artifacts(state)
        _send_status(state)
    return SyncCounts(
        params=params,
        points=points,
        artifacts=artifacts,
        experiment_id=state.note.experiment_id,
        run_id=state.note.run_id,
        refused=tuple(refused),
    )


def forget(run_dir: Path) -> None:
    """Deletes a folder's run from the store that it was last sent to, if it was sent anywhere.

    Raises:
        StoreError: the store can't be reached or written.
    """
    note = read_note(run_dir)
    if note is None:
        return
    client = open_store(note.uri)
    with store_errors(note.uri):
        client.delete_run(note.run_id)


def _find_run(state: _SyncState, experiment: str, *, moves: bool) -> None:
    """Notes which MLflow run belongs to this folder: the one noted, or found by uid, or a new one.

    `moves` says that the caller named the experiment, so that a run in another one does not count.
    """
    client, record, note = state.client, state.record, state.note
    # A copied folder has the note of the run that it was copied from, hence the comparison of uids.
    is_noted = note.uri == state.uri and note.uid == record.uid
    if is_noted and _is_usable(state, experiment, moves):
        return
    experiment_id = find_or_make_experiment(client, experiment, state.uri).experiment_id
    # The uid is sent with the creation itself: a sender that dies right after it leaves a run that
    # is found again, and no second one is made.
    has_this_uid = f"tags.`relloc.uid` = '{record.uid}'"
    matches = client.search_runs([experiment_id], has_this_uid, max_results=1)
    if matches:
        run = matches[0]
    else:
        run = client.create_run(
            experiment_id,
            record.started_ms,
            tags={"relloc.uid": record.uid},
            run_name=record.name[:NAME_CHARACTERS],
        )
    state.note = Note(
        uri=state.uri, uid=record.uid, experiment_id=experiment_id, run_id=run.info.run_id
    )
    # A run that was there already may have points that the lost note knew of.
    state.update_note(unsure=bool(matches))


def _is_usable(state: _SyncState, experiment: str, moves: bool) -> bool:
    """Returns whether the noted run can be continued; False means to look for it or make it anew.

    Raises:
        StoreError: the run, or its experiment, was deleted in MLflow; the message says what to do.
    """
    from mlflow.exceptions import MlflowException

    client, uri, note = state.client, state.uri, state.note
    # A run that was deleted for good (`mlflow gc`), or a store that was made anew, knows no such
    # id.
    try:
        run = client.get_run(note.run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    deleted = run.info.lifecycle_stage == "deleted"
    if not deleted and not moves:
        return True
    # A run of another experiment is left alone if the user moved on from that experiment.
    current = client.get_experiment(run.info.experiment_id)
    if current.name != experiment and (moves or is_deleted(current)):
        return False
    if not deleted:
        return True
    # Whoever deleted a run may have meant it: neither is it restored nor silently sent again.
    if is_deleted(current):
        raise_deleted(current, uri)
    raise StoreError(
        f"run {note.run_id} was deleted in {uri}. Restore it with "
        f"`MLFLOW_TRACKING_URI={uri} mlflow runs restore --run-id {note.run_id}`, "
        f"or remove {state.run_dir / NOTE_FILE} to send it as a new run"
    )


def _send_record(state: _SyncState) -> int:
    """Sends name, params, tags and data sets of the run if run.json changed.

    Returns:
        How many params are new to the store.
    """
    from mlflow.entities import Param, RunTag

    client, record, note = state.client, state.record, state.note
    # A resumed run may have written run.json with other settings.
    digest = hashlib.sha256((state.run_dir / RUN_FILE).read_bytes()).hexdigest()
    if digest == note.record:
        return 0
    # Values are cut to MLflow's limit, since one that is longer makes it refuse a whole batch.
    stored = client.get_run(note.run_id).data.params
    params: dict[str, str] = {}
    for name, value in record.params.items():
        text = value if isinstance(value, str) else json.dumps(value)
        params[legal_name(name)] = text[:PARAM_CHARACTERS]
    fresh = [Param(name, text) for name, text in params.items() if name not in stored]

    tags = record.tags | {"relloc.uid": record.uid, "relloc.run_dir": str(state.run_dir)}
    # MLflow's UI shows these tags as the source of a run: its command and its commit.
    kind = record.tags.get("relloc.kind")
    if kind:
        tags |= {"mlflow.source.name": f"relloc.{kind}", "mlflow.source.type": "LOCAL"}
    commit = record.tags.get("relloc.commit")
    if commit:
        tags["mlflow.source.git.commit"] = commit
    # MLflow never changes a param, so the changed values of a resumed run go into a tag.
    changes = [
        f"{name}: {old} -> {params[name]}"
        for name, old in stored.items()
        if params.get(name, old) != old
    ]
    if changes:
        tags["relloc.changed_params"] = "; ".join(changes)

    run_tags = [RunTag(legal_name(name), text[:TAG_CHARACTERS]) for name, text in tags.items()]
    client.log_batch(note.run_id, params=fresh, tags=run_tags)
    client.log_inputs(note.run_id, _inputs(record.datasets))
    client.update_run(note.run_id, name=record.name[:NAME_CHARACTERS])
    state.update_note(record=digest)
    return len(fresh)


def _inputs(datasets: Iterable[DatasetRecord]) -> list[Any]:
    """Returns one MLflow input per data set, with all contexts that the run used the data set in.

    MLflow would drop the second of two inputs of the same data set, such as its use for evaluation.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    # The same data set may be recorded twice, with the contexts "train" and "eval".
    by_identity: dict[tuple[str, str], list[DatasetRecord]] = {}
    for dataset in datasets:
        by_identity.setdefault((dataset.name, dataset.digest), []).append(dataset)
    inputs = []
    for uses in by_identity.values():
        first = uses[0]
        dataset_of_mlflow = Dataset(
            name=first.name,
            digest=first.digest[:DIGEST_CHARACTERS],
            source_type="local",
            source=json.dumps({"uri": first.source}),
            profile=json.dumps({"n_images": first.n_images}),
        )
        contexts = dict.fromkeys(use.context for use in uses)  # each once, in order
        context_tag = InputTag("mlflow.data.context", ", ".join(contexts))
        inputs.append(DatasetInput(dataset_of_mlflow, [context_tag]))
    return inputs


def _send_points(state: _SyncState) -> int:
    """Sends the metric points of journals and results that the store lacks; returns how many."""
    unsure = state.note.unsure
    sent = _send_batches(state, _journal_batches(state), unsure)
    rows = read_results(state.run_dir)
    # Journals only grow, but an evaluation that was repeated may have replaced result rows that
    # were sent before: then all rows are compared with the store again.
    n_sent_rows = state.note.results
    were_replaced = n_sent_rows > 0 and _digest(rows[:n_sent_rows]) != state.note.results_digest
    fresh = rows if were_replaced else rows[n_sent_rows:]
    if fresh:
        # Of two values of one name and step, MLflow shows the one with the later time. Each row is
        # one millisecond later than the row before it, so that the last row wins.
        points: list[Metric] = []
        ends = _ends_of_curves(state.run_dir)
        for later_ms, row in enumerate(fresh):
            points += _row_points(row, now_ms() + later_ms, ends)
        batch = points, {"results": len(rows), "results_digest": _digest(rows)}
        sent += _send_batches(state, [batch], unsure or were_replaced)
    if state.note.unsure:
        state.update_note(unsure=False)
    return sent


def _send_batches(state: _SyncState, batches: Iterable[PointBatch], unsure: bool) -> int:
    """Sends batches of points and notes each; returns the number of points sent.

    If `unsure`, the points that the store has already are left out.
    """
    client, run_id = state.client, state.note.run_id
    sent = 0
    known = None
    for points, note_changes in batches:
        # The store's points are read once, and only if there is something to send.
        if known is None:
            names = client.get_run(run_id).data.metrics if unsure else ()
            known = set()
            for name in names:
                history = client.get_metric_history(run_id, name)
                known.update(_identity(point) for point in history)
        # A crash between these two notes leaves the note unsure, which the next `sync` sees.
        state.update_note(unsure=True)
        fresh = [point for point in points if _identity(point) not in known]
        client.log_batch(run_id, metrics=fresh)
        # A note that was unsure stays so until all batches were compared with the store.
        state.update_note(unsure=unsure, **note_changes)
        sent += len(fresh)
    return sent


def _identity(point: "Metric") -> tuple[str, int, str]:
    """Returns what two equal points share: name, step, and the value as stores keep it."""
    # Stores keep infinities as the largest float, and nan does not equal itself.
    largest = sys.float_info.max
    if math.isnan(point.value):
        return point.key, point.step, "nan"
    stored_value = max(-largest, min(largest, point.value))
    return point.key, point.step, repr(stored_value)


def _journal_batches(state: _SyncState) -> Iterator[PointBatch]:
    """Yields the points of curves that were not sent, about `POINTS_A_BATCH` at a time."""
    from mlflow.entities import Metric

    readers = {
        "lines": functools.partial(read_journal, file=JOURNAL_FILE),
        "system": functools.partial(read_journal, file=SYSTEM_FILE),
        "watched": watched_entries,
    }
    for note_field, read in readers.items():
        first_line = getattr(state.note, note_field)
        entries = read(state.run_dir, first_line)
        last_line = first_line + len(entries)
        points: list[Metric] = []
        for line, entry in enumerate(entries, start=first_line + 1):
            points += [
                Metric(legal_name(name), value, entry.time_ms, entry.step)
                for name, value in entry.metrics.items()
            ]
            # Batches end between lines, so that the note can count whole lines.
            if len(points) >= POINTS_A_BATCH or line == last_line:
                yield points, {note_field: line}
                points = []


def _ends_of_curves(run_dir: Path) -> dict[str, float]:
    """Returns the last value of each metric in the journal."""
    ends: dict[str, float] = {}
    for entry in read_journal(run_dir):
        ends.update(entry.metrics)
    return ends


def _row_points(row: Result, time_ms: int, ends: Mapping[str, float]) -> list["Metric"]:
    """Returns the points of one result row: its own at step 0, and its points of curves.

    A row that its own curve ends with has no other point: fine-tuning is tested every so often, and
    at step 0 the row would be the beginning of that curve, too. `ends` are the last values of
    curves, by their names.

    Rows of a layer are also points of a curve over the layers (steps 1 to 5), and rows with a k of
    a curve over k. Rows of spread (intervals, deviations) are left out of curves, which they would
    hide.
    """
    from mlflow.entities import Metric

    steps = {}
    if ends.get(row.tracked_name) != row.value:
        steps[row.tracked_name] = 0
    if row.layer and not row.spread:
        if row.layer != "avgpool":
            steps[f"{row.tracked_eval}/{row.metric}_by_layer"] = LAYERS.index(row.layer) + 1
        if row.k is not None:
            steps[f"{row.tracked_eval}/{row.layer}/{row.series}_by_k"] = row.k
    return [Metric(legal_name(name), row.value, time_ms, step) for name, step in steps.items()]


def _digest(rows: Sequence[Result]) -> str:
    """Returns a hash of result rows, by which replaced rows are noticed."""
    text = repr([dataclasses.astuple(row) for row in rows])
    return hashlib.sha256(text.encode()).hexdigest()


def _send_artifacts(state: _SyncState) -> tuple[int, list[str]]:
    """Sends new and changed files; returns their count, and a sentence for each refused file."""
    from mlflow.exceptions import MlflowException

    run_dir = state.run_dir
    names, refused = sort_artifacts(run_dir)
    sent = 0
    for name in names:
        # Size and modification time tell a changed file; large ones are not read to compare them.
        file_stat = (run_dir / name).stat()
        version = [file_stat.st_size, file_stat.st_mtime_ns]
        if state.note.artifacts.get(name) == version:
            continue
        folder = str(PurePosixPath(name).parent)
        artifact_path = None if folder == "." else folder
        try:
            state.client.log_artifact(state.note.run_id, str(run_dir / name), artifact_path)
        except MlflowException as error:
            # Any other error is the store's and not this file's, so the whole sending fails.
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            refused.append(f"{name!r} was not sent: MLflow does not accept this file name")
            continue
        state.update_note(artifacts={**state.note.artifacts, name: version})
        sent += 1
    return sent, refused


def _send_status(state: _SyncState) -> None:
    """Sends the run's status if it changed; MLflow wants an end time for final statuses."""
    current = read_status(state.run_dir)
    if current is None or dataclasses.asdict(current) == state.note.status:
        return
    if current.status in (Status.RUNNING, Status.WAITING):
        state.client.update_run(state.note.run_id, current.status)
    else:
        state.client.set_terminated(state.note.run_id, current.status, current.time_ms)
    state.update_note(status=dataclasses.asdict(current))
