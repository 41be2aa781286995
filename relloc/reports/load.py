"""Loads our results from run folders, each with the run that measured it."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from relloc.checkpoints.paths import BACKBONE_FILE
from relloc.errors import DataError
from relloc.reports.folder_names import with_folder_names
from relloc.reports.published import BEST_LAYER
from relloc.results import RESULTS_FILE, Result, read_results
from relloc.tracking.record import RUN_FILE, RunRecord
from relloc.tracking.unfinished import unfinished_training
from relloc.tracking.watched import read_watched

UNKNOWN_COMMIT = "unknown"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The run that measured a number.

    Attributes:
        folder: The run folder.
        name: Its name, as MLflow shows it.
        commit: The commit of the code, with "-dirty" where files had been changed.
        started_ms: When it started, as Unix time in milliseconds.
        digests: The hash of each set of images, such as `in1k-val`, of which the run recorded
            exactly one.
    """

    folder: Path
    name: str
    commit: str
    started_ms: int
    digests: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """What a line of a table is about: a checkpoint, and how it was evaluated.

    `variant` names the run where other numbers of the same line were measured differently. The
    other fields are as in a `Result`.
    """

    checkpoint: str
    model: str
    batch_norm: str
    seed: int
    strides: str = ""
    decoder: str = ""
    variant: str = ""

    @property
    def without_variant(self) -> "Line":
        """The same line with an empty variant."""
        return dataclasses.replace(self, variant="")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """A result with the run that measured it.

    Attributes:
        result: The row of results.jsonl.
        run: The run that measured it.
        older: Earlier measurements of the same number, which it replaces.
        variant: The variant of its line.
        images: Names the digest of the images where others have the same name, split and number.
        recorded_dataset: The name of its data set in the record of the run.
    """

    result: Result
    run: Run
    older: tuple["Measured", ...] = ()
    variant: str = ""
    images: str = ""
    recorded_dataset: str = ""

    @property
    def digest(self) -> str:
        """The hash of the evaluated images, as the run recorded it, or "" if it did not."""
        dataset = self.recorded_dataset or self.result.dataset
        return self.run.digests.get(f"{dataset}-{self.result.split}", "")

    @property
    def line(self) -> Line:
        """The line of a table that the number belongs to."""
        row = self.result
        return Line(
            checkpoint=row.checkpoint,
            model=row.model,
            batch_norm=row.batch_norm,
            seed=row.seed,
            strides=row.strides,
            decoder=row.decoder,
            variant=self.variant,
        )

    @property
    def quantity(self) -> tuple[object, ...]:
        """A key of what the number measures, by names alone.

        Whether two measurements of a quantity were made alike is said by their fingerprints.
        """
        row = self.result
        # Where the best layer is asked for, the layer is a part of the answer
        layer = "" if row.column == BEST_LAYER else row.layer
        cell = (
            row.table or row.eval,
            row.column,
            row.variant,
            row.metric,
        )
        return self.line, *cell, row.dataset, row.split, row.n, layer


def find_measured(paths: Sequence[Path]) -> list[Measured]:
    """Returns the results of all run folders at or below `paths`, those of the oldest run first.

    A row that was copied from another run folder is attributed to the run that measured it. If that
    folder is gone, only its name is known.

    Raises:
        DataError: A path is missing, no run below the paths has results, or a file is broken.
    """
    for path in paths:
        if not path.exists():
            raise DataError(
                f"{path} does not exist: name run folders, or folders that hold some "
                "(or set RELLOC_RUNS)"
            )
    # Paths may overlap, and links lead to one folder twice
    folders = set()
    for path in paths:
        for folder, inside, files in os.walk(path):
            # Hidden folders hold no runs, but compiled code in thousands of files. os.walk descends
            # into what is left in this list.
            inside[:] = [name for name in inside if not name.startswith(".")]
            if RESULTS_FILE in files:
                folders.add(Path(folder).resolve())
    measured: list[Measured] = []
    for folder in sorted(folders):
        measured += _results_in(folder)
    if not measured:
        # A training that was ended before its evaluation is the likely reason: say how to go on
        unfinished = list(filter(None, map(unfinished_training, paths)))
        if unfinished:
            raise DataError("; ".join(unfinished))
        raise DataError(
            f"no run folder ({RUN_FILE} and {RESULTS_FILE}) with results at or below "
            f"{', '.join(map(str, paths))}: run python -m relloc.evaluate first, "
            "or name other folders"
        )
    # Later steps let the last of several measurements stand
    return sorted(measured, key=_age)


def _age(each: Measured) -> tuple[int, str]:
    """Returns a sort key: the start of the run, and its folder among runs of one millisecond."""
    return each.run.started_ms, str(each.run.folder)


def _results_in(folder: Path) -> Iterator[Measured]:
    """Yields the results of one folder; none if it is not a run folder."""
    if not (folder / RUN_FILE).exists():
        return  # MLflow's copy of the results lies in a folder without a run record
    try:
        # Each run that measured some of the rows is read once
        record = RunRecord.read(folder)
        own = _run(folder, record)
        rows = without_curves(read_results(folder), record)
        origins = {row.measured_in: _origin(row.measured_in, own) for row in rows}
    except (ValueError, OSError) as error:
        raise DataError(f"{error}: repair or remove it, or name other folders") from error
    # Outside of the `try`: errors of whoever takes the results are none of these files
    for row, named in zip(rows, with_folder_names(rows, record.params), strict=True):
        yield Measured(
            result=named,
            run=origins[row.measured_in],
            recorded_dataset=row.dataset,
        )


def without_curves(rows: Sequence[Result], record: RunRecord) -> Sequence[Result]:
    """Returns the results of a run without those of trainings that had not come to their end.

    A run that watched trainings measured all their checkpoints. Those before the end are points of
    curves (`find_watched`); in tables they would be lines without number, or be taken for repeats.

    Args:
        rows: The results of the run.
        record: The record of the run.
    """
    if "watch" not in record.params:
        return rows
    return [row for row in rows if Path(row.checkpoint).name == BACKBONE_FILE]


def find_watched(folder: Path) -> list[tuple[int, Measured]]:
    """Returns what was measured of a training's checkpoints, each with the step of the training.

    Raises:
        DataError: A file is broken.
    """
    try:
        record = RunRecord.read(folder)
        own = _run(folder, record)
        watched = read_watched(folder)
        places = {each.result.measured_in for each in watched}
        origins = {place: _origin(place, own) for place in places}
    except (ValueError, OSError) as error:
        raise DataError(f"{error}: repair or remove it, or name other folders") from error
    rows = [each.result for each in watched]
    found = []
    for each, named in zip(watched, with_folder_names(rows, record.params), strict=True):
        row = each.result
        measured = Measured(
            result=named, run=origins[row.measured_in], recorded_dataset=row.dataset
        )
        found.append((each.step, measured))
    return found


def _origin(measured_in: str, own: Run) -> Run:
    """Returns the run that measured a row; `own` is the run in whose folder the row lies."""
    if not measured_in:
        return own
    folder = Path(measured_in)
    # Runs that were moved or copied together, such as from a cluster, still lie side by side.
    for place in (folder, own.folder.parent / folder.name):
        if (place / RUN_FILE).exists():
            return _run(place.resolve(), RunRecord.read(place))
    # The folder was removed since the row was copied from it
    return dataclasses.replace(own, folder=folder, name=folder.name, commit=UNKNOWN_COMMIT)


def _run(folder: Path, record: RunRecord) -> Run:
    # A name with several digests does not say which of them a number was measured on
    digests = {(dataset.name, dataset.digest) for dataset in record.datasets}
    names = [name for name, _ in digests]
    unique = {name: digest for name, digest in digests if names.count(name) == 1}
    return Run(
        folder=folder,
        name=record.name,
        commit=record.tags.get("relloc.commit", UNKNOWN_COMMIT),
        started_ms=record.started_ms,
        digests=unique,
    )


def newest(measured: Iterable[Measured]) -> list[Measured]:
    """Returns the last of the results that share a quantity and a fingerprint.

    It holds the earlier ones in `older`. Copies of a result in other run folders count once.

    Args:
        measured: Results, the oldest first.
    """
    # For each quantity and fingerprint its measurements, the newest first
    by_quantity: dict[object, dict[object, Measured]] = {}
    for each in reversed(list(measured)):
        # The same in the folder that measured it and in those that it was copied to
        row = dataclasses.replace(each.result, measured_in="")
        measurement = (row, each.run.folder)
        measurements = by_quantity.setdefault((each.quantity, each.result.fingerprint), {})
        measurements.setdefault(measurement, each)
    results = []
    for measurements in reversed(by_quantity.values()):
        last, *older = measurements.values()
        # `older` has the oldest first
        older.reverse()
        results.append(dataclasses.replace(last, older=tuple(older)))
    return results
