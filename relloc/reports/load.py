"""Our numbers as they lie on disk: the results of all run folders below some paths, each with its run."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from relloc.errors import DataError
from relloc.reports.published import BEST_LAYER
from relloc.results import RESULTS_FILE, Result, read_results
from relloc.tracking.record import RUN_FILE, RunRecord
from relloc.tracking.unfinished import unfinished_training

UNKNOWN_COMMIT = "unknown commit"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Where a number was measured; `started_ms` is Unix time in milliseconds.

    `digests` has the hash of each set of images, `in1k-val`, of which the run recorded one only.
    """

    folder: Path
    name: str
    commit: str
    started_ms: int
    digests: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """Who was evaluated, and how: a line of a table. `variant` names the run where others were measured otherwise."""

    checkpoint: str
    model: str
    batch_norm: str
    seed: int
    variant: str = ""

    @property
    def whole(self) -> "Line":
        """The line without its variant."""
        return dataclasses.replace(self, variant="")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """A result and its run; `older` are earlier measurements of it that it replaces, `variant` is that of its line.

    `images` tells the images from others of the same name, split and number, where there are such.
    """

    result: Result
    run: Run
    older: tuple["Measured", ...] = ()
    variant: str = ""
    images: str = ""

    @property
    def digest(self) -> str:
        """The hash of the images it was measured on, as the run's record has it; "" if it has none."""
        return self.run.digests.get(f"{self.result.dataset}-{self.result.split}", "")

    @property
    def line(self) -> Line:
        row = self.result
        return Line(
            checkpoint=row.checkpoint,
            model=row.model,
            batch_norm=row.batch_norm,
            seed=row.seed,
            variant=self.variant,
        )

    @property
    def question(self) -> tuple[object, ...]:
        """What the number answers as its names say; the fingerprint says whether two were measured alike."""
        row = self.result
        # Where the best layer is asked for, the layer is a part of the answer
        layer = "" if row.column == BEST_LAYER else row.layer
        place = (row.table or row.eval, row.column, row.variant, row.metric)
        return self.line, *place, row.dataset, row.split, row.n, layer


def find_measured(paths: Sequence[Path]) -> list[Measured]:
    """The results of all run folders at or below `paths`, each folder once, oldest run first.

    The run of a row that was copied from another folder is the one that measured it; of that only
    the folder is known where it is gone.

    Raises:
        DataError: a path is missing, no run below them has results, or a file is broken.
    """
    for path in paths:
        if not path.exists():
            raise DataError(
                f"{path} does not exist: name run folders, or folders that hold some (or set RELLOC_RUNS)"
            )
    folders = {file.parent.resolve() for path in paths for file in path.rglob(RESULTS_FILE)}
    found = [each for folder in sorted(folders) for each in _of_folder(folder)]
    if not found:
        if unfinished := list(filter(None, map(unfinished_training, paths))):
            raise DataError("; ".join(unfinished))
        raise DataError(
            f"no run folder ({RUN_FILE} and {RESULTS_FILE}) with results at or below "
            f"{', '.join(map(str, paths))}: run python -m relloc.evaluate first, or name other folders"
        )
    return sorted(found, key=lambda each: (each.run.started_ms, str(each.run.folder)))


def _of_folder(folder: Path) -> Iterator[Measured]:
    if not (folder / RUN_FILE).exists():
        return  # a tracker's copy of the results
    try:
        own, rows = _run(folder), read_results(folder)
        origins = {row.measured_in: _origin(row.measured_in, own) for row in rows}
    except (ValueError, OSError) as error:
        raise DataError(f"{error}: mend or remove it, or name other folders") from error
    yield from (Measured(result=row, run=origins[row.measured_in]) for row in rows)


def _origin(measured_in: str, own: Run) -> Run:
    if not measured_in:
        return own
    folder = Path(measured_in)
    if (folder / RUN_FILE).exists():
        return _run(folder.resolve())
    return dataclasses.replace(own, folder=folder, name=folder.name, commit=UNKNOWN_COMMIT)


def _run(folder: Path) -> Run:
    record = RunRecord.read(folder)
    images = {(one.name, one.digest) for one in record.datasets}
    names = [name for name, _ in images]
    return Run(
        folder=folder,
        name=record.name,
        commit=record.tags.get("relloc.commit", UNKNOWN_COMMIT),
        started_ms=record.started_ms,
        digests={name: digest for name, digest in images if names.count(name) == 1},
    )


def newest(measured: Iterable[Measured]) -> list[Measured]:
    """One result for each question and fingerprint (or none): the last, which keeps the others, copies aside."""
    answers: dict[tuple[object, ...], dict[tuple[object, ...], Measured]] = {}
    for each in reversed(list(measured)):
        # The same in the folder that measured it and in those that it was copied to
        measurement = (dataclasses.replace(each.result, measured_in=""), each.run.folder)
        answers.setdefault((each.question, each.result.fingerprint), {}).setdefault(
            measurement, each
        )
    kept = [list(answer.values()) for answer in reversed(answers.values())]
    return [dataclasses.replace(last, older=tuple(reversed(older))) for last, *older in kept]
