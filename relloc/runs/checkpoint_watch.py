"""Evaluates the checkpoints of trainings while these go on: `relloc.evaluate watch=RUN_OR_SWEEP`.

The trainings run elsewhere, and are only read: their checkpoints, their record and whether a
process has their folder. What is measured goes into the run folder of this command, as of any
evaluation, and from there into watched.jsonl in the folder of the training, which MLflow gets as
curves over the steps. A repeated command measures nothing again, since rows are found by the
fingerprint of their weights.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from relloc import ranks
from relloc.checkpoints import backbone_files
from relloc.checkpoints.paths import BACKBONE_FILE, saved_milestones, saved_trainings
from relloc.errors import (
    CheckpointError,
    DamagedFile,
    DamagedTraining,
    TrainingUnfinished,
    UsageError,
    reason,
)
from relloc.evaluation.contract import EvaluatedModel
from relloc.files import path_as_text
from relloc.results import Result, append_results, read_results
from relloc.runs import console
from relloc.runs.command_settings import Evaluating, WatchSettings
from relloc.runs.engine import resolve_engine
from relloc.runs.evaluated_models import saved_model
from relloc.runs.evaluating import check_networks, prepared, print_left_out, print_report
from relloc.runs.invocation import Invocation
from relloc.status import Status
from relloc.sweeps.point_status import PointStatus, point_statuses_and_problems
from relloc.sweeps.points import Point
from relloc.terminal import quantity
from relloc.tracking import RunRecord, StoreError, sync
from relloc.tracking.journal import read_journal
from relloc.tracking.run_lock import FolderIsTaken, locked_run_folder
from relloc.tracking.unfinished import unfinished_training
from relloc.tracking.watched import append_watched

# How often the folder of a training that has ended is asked for, where others have it each time.
_MOST_TRIES = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedCheckpoint:
    """A file of weights that a training saved after `step` steps."""

    path: Path
    step: int


@dataclasses.dataclass(kw_only=True)
class WatchedTraining:
    """A training whose checkpoints are evaluated, and which of them have been.

    Attributes:
        folder: its run folder, which need not exist yet.
        done: the files that were evaluated or can't be.
        steps_done: the steps of the weights that were evaluated.
        final_rows: the results of backbone.safetensors, once they were measured.
        is_given_results: whether `final_rows` are in the training's own results, or never will be.
        n_taken: how often somebody else had the folder when the results were to be written.
        refusal: why its networks can't be evaluated with the settings, if they can't.
        is_said_to_wait: whether it was printed that nobody runs it, since it last ran.
        reported: problems that were printed already.
        damage: what is damaged, with the path that it is about.
    """

    folder: Path
    done: set[Path] = dataclasses.field(default_factory=set)
    steps_done: set[int] = dataclasses.field(default_factory=set)
    final_rows: list[Result] = dataclasses.field(default_factory=list)
    is_given_results: bool = False
    n_taken: int = 0
    refusal: UsageError | None = None
    is_said_to_wait: bool = False
    reported: set[str] = dataclasses.field(default_factory=set)
    damage: dict[str, Path] = dataclasses.field(default_factory=dict)
    _steps: dict[Path, int] = dataclasses.field(default_factory=dict)

    @property
    def weights(self) -> Path:
        """The file with the weights at the end of the training."""
        return self.folder / BACKBONE_FILE

    def next_checkpoint(self) -> SavedCheckpoint | None:
        """Returns the earliest checkpoint that has yet to be evaluated, or None.

        These are the milestones and the newest checkpoint; once the training is at its end, its
        weights take the place of the newest. A checkpoint that a slow evaluation does not get to
        before the training deletes it is left out.
        """
        # In this order: a milestone is saved before the checkpoint of the same step, so that no
        # milestone turns up later than a newer checkpoint.
        newest = saved_trainings(self.folder)[-1:]
        if self.weights.exists():
            newest = [self.weights]
        found = []
        for path in (*saved_milestones(self.folder), *newest):
            if path in self.done:
                continue
            step = self._step_of(path)
            if step is None:
                continue
            # The last weights are evaluated under their own name, too, by which reports know them.
            # The runner finds that they were measured.
            if step in self.steps_done and path != self.weights:
                self.done.add(path)
                continue
            found.append(SavedCheckpoint(path=path, step=step))
        return min(found, key=lambda checkpoint: checkpoint.step, default=None)

    def _step_of(self, path: Path) -> int | None:
        """Returns after how many steps a file was saved, or None where it can't be read."""
        if path not in self._steps:
            try:
                _, about = backbone_files.load_backbone(path)
                self._steps[path] = int(about["step"])
            except CheckpointError as error:
                self.leave_out(path, str(error))
                return None
            except (KeyError, TypeError, ValueError):
                self.leave_out(path, f"{path} does not say after which step it was saved")
                return None
        return self._steps[path]

    def leave_out(self, path: Path, problem: str) -> None:
        """Has a file no longer asked for, and prints why unless the training has deleted it."""
        self.done.add(path)
        if path.exists():
            self.report_damage(
                f"{problem}. It is left out: put back a copy, or remove it, and give the same "
                "command again",
                path,
            )

    def report_damage(self, problem: str, path: Path) -> None:
        """Prints that a file of this training is damaged, once, and notes it for the end."""
        self.damage.setdefault(problem, path)
        self.report(problem)

    def damage_left(self) -> list[str]:
        """Returns what is damaged, without checkpoints that the training has deleted since."""
        return [problem for problem, path in self.damage.items() if path.exists()]

    def check_record(self) -> bool:
        """Returns whether the record and the journal can be read, and prints it if they can't."""
        try:
            RunRecord.read(self.folder)
            read_journal(self.folder)
        except DamagedFile as error:
            self.report_damage(str(error), self.folder)
            return False
        except OSError:
            # A copied folder may have no record.
            pass
        return True

    def report(self, problem: str) -> None:
        """Prints a problem of this training, once."""
        if problem not in self.reported:
            self.reported.add(problem)
            console.print_message(f"watch   {problem}")


def watch_trainings(settings: Evaluating, watch: WatchSettings, invocation: Invocation) -> None:
    """Evaluates checkpoints as they appear, until the trainings have ended and all are evaluated.

    Raises:
        UsageError: a setting can't be met, or the folder is not that of such a run.
        TrainingUnfinished: a training was not at its end, and none went on for too long.
        DamagedTraining: a training has damaged files; all else is done.
        DataError: images or labels can't be used.
    """
    engine = resolve_engine(settings.engine)
    if ranks.world_size() > 1:
        raise UsageError("watch= runs in one process, which takes one GPU: leave torchrun out")
    # Wrong names are a mistake before anything is read.
    watch.trainings()

    def name_of(data_names: Sequence[str], studies: Sequence[str]) -> str:
        names = ", ".join(Path(name).name for name in watch.names)
        measured = [", ".join(dict.fromkeys(data_names)), ", ".join(studies)]
        return f"watch {names} on {': '.join(filter(None, measured))}"

    with prepared(settings, invocation, engine, name_of) as ready:
        run_dir = ready.run.run_dir
        watching = Watch(
            settings=settings,
            watch=watch,
            run_dir=run_dir,
            measure=ready.measure,
            # tracking=none of this command holds for the runs of the trainings, too.
            is_tracked=invocation.settings["tracking"]["uri"] is not None,
        )
        fingerprints = watching.to_the_end()
        if not fingerprints:
            # There is nothing to report.
            watching.raise_if_damaged()
        if ready.run.folder:
            ready.run.folder.summarize(fingerprints)
    if settings.report:
        print_report(run_dir)
        print_left_out(ready.left_out)
    console.print_next("report", console.from_here(run_dir))
    watching.raise_if_damaged()


@dataclasses.dataclass(kw_only=True)
class Watch:
    """Evaluates the checkpoints of trainings, within a run whose folder is open.

    Attributes:
        settings: of the evaluations. watch: which trainings, and how long to wait for them.
        run_dir: the folder of this run, which has the results of all checkpoints.
        measure: runs the evaluations of a backbone that are not measured, and returns the
            fingerprints of its results.
        is_tracked: whether the MLflow runs of the trainings get the curves.
        trainings: those that are known so far, by their folders.
        damaged_names: errors of names of `watch` that can't be looked up, as of the last look.
        printed: messages about the former and about silent schedulers, which were printed already.
    """

    settings: Evaluating
    watch: WatchSettings
    run_dir: Path
    measure: Callable[[EvaluatedModel], set[str]]
    is_tracked: bool
    trainings: dict[Path, WatchedTraining] = dataclasses.field(default_factory=dict)
    damaged_names: list[DamagedFile] = dataclasses.field(default_factory=list)
    printed: set[str] = dataclasses.field(default_factory=set)

    def to_the_end(self) -> set[str]:
        """Evaluates until nothing is left to come; returns the fingerprints of the last rows.

        Raises:
            TrainingUnfinished: a training is not at its end, and none has run for a while.
            UsageError: no training has networks that can be evaluated with the settings.
        """
        fingerprints: dict[Path, set[str]] = {}
        last_alive_s = time.monotonic()
        while True:
            # Statuses are read before files: what a training saved before it ended is seen.
            statuses = self._statuses()
            n_evaluated = 0
            for status in statuses:
                training = self.trainings[status.point.folder]
                checkpoint = training.next_checkpoint()
                # One of each training in turn, so that no training waits for all of another.
                if checkpoint:
                    n_evaluated += 1
                    measured = self._evaluate(training, checkpoint)
                    if measured:
                        fingerprints[training.folder] = measured
            is_alive = n_evaluated > 0 or any(map(_may_run, statuses))
            if is_alive:
                last_alive_s = time.monotonic()
            if n_evaluated:
                continue
            # All that a training saved has been evaluated by now.
            open_trainings = [status for status in statuses if not self._has_ended(status)]
            are_settled = self._settle_ended(statuses)
            if not open_trainings and are_settled:
                return set().union(*fingerprints.values())
            self._report_stopped(open_trainings)
            idle_s = time.monotonic() - last_alive_s
            if not is_alive and are_settled and idle_s >= 60 * self.watch.patience_min:
                raise self._unfinished(open_trainings)
            time.sleep(self.watch.every_s)

    def _statuses(self) -> list[PointStatus]:
        """Returns how the trainings stand now, those of sweeps that got more points included.

        Trainings that were refused are left out.

        Raises:
            UsageError: all trainings were refused.
        """
        points: list[Point] = []
        refused = []
        found, self.damaged_names = self.watch.trainings()
        for error in self.damaged_names:
            self._print_once(f"{error}. The others are watched")
        for point in found:
            training = self.trainings.setdefault(point.folder, WatchedTraining(folder=point.folder))
            if training.refusal:
                refused.append(training)
            else:
                points.append(point)
        for training in refused:
            if training.refusal and not points:
                raise training.refusal
            training.report(f"{training.refusal}. {training.folder} is left out")
        statuses, problems = point_statuses_and_problems(points)
        # A cluster that does not answer leaves the status unknown, and is asked again.
        for problem in problems:
            self._print_once(f"{problem}; asked again")
        return statuses

    def _print_once(self, problem: str) -> None:
        """Prints a problem that is met at every look, once."""
        if problem not in self.printed:
            self.printed.add(problem)
            console.print_message(f"watch   {problem}")

    def _has_ended(self, status: PointStatus) -> bool:
        """Returns whether a training is at its end."""
        return not _may_run(status) and self.trainings[status.point.folder].weights.exists()

    def _settle_ended(self, statuses: Sequence[PointStatus]) -> bool:
        """Gives trainings that have ended their last results; returns whether none lacks them."""
        are_settled = True
        for status in statuses:
            training = self.trainings[status.point.folder]
            if self._has_ended(status) and not training.is_given_results:
                training.is_given_results = self._give_results(training)
                are_settled = are_settled and training.is_given_results
        return are_settled

    def _evaluate(self, training: WatchedTraining, checkpoint: SavedCheckpoint) -> set[str]:
        """Evaluates a checkpoint and notes the results; returns their fingerprints."""
        path = checkpoint.path
        try:
            model = saved_model(self.settings, path)
            check_networks([model], self.settings)
        except CheckpointError as error:
            training.leave_out(path, str(error))
            return set()
        except UsageError as error:
            # The settings may fit other trainings; all networks of this one are alike.
            training.refusal = error
            return set()
        console.print_message(f"watch   {training.folder.name} after step {checkpoint.step}")
        fingerprints = self.measure(model)
        training.done.add(path)
        training.steps_done.add(checkpoint.step)

        # The rows as those of another folder, which say where they were measured.
        rows = []
        for row in read_results(self.run_dir):
            if row.checkpoint == model.checkpoint and row.fingerprint in fingerprints:
                measured_in = row.measured_in or path_as_text(self.run_dir)
                rows.append(dataclasses.replace(row, measured_in=measured_in))
        if path == training.weights:
            training.final_rows = rows
        try:
            append_watched(training.folder, checkpoint.step, rows)
        except (OSError, DamagedFile) as error:
            problem = (
                f"curves can't be written into {training.folder}; what was measured is in "
                f"{self.run_dir}: {_why(error)}"
            )
            self._report(training, problem, error)
        else:
            self._mirror(training)
        return fingerprints

    def _give_results(self, training: WatchedTraining) -> bool:
        """Appends the results of the final weights to those of the training that lack them.

        The training has ended, so that its folder can be locked. Somebody else may have it, such as
        a second command that watches the training.

        Returns:
            Whether that is settled; False asks for another try.
        """
        try:
            with locked_run_folder(training.folder):
                own = read_results(training.folder)
                known = {(row.eval, row.fingerprint) for row in own}
                missing = [
                    row for row in training.final_rows if (row.eval, row.fingerprint) not in known
                ]
                if missing:
                    append_results(training.folder, missing)
        except (OSError, FolderIsTaken, DamagedFile) as error:
            if isinstance(error, FolderIsTaken):
                training.n_taken += 1
                if training.n_taken < _MOST_TRIES:
                    return False
            problem = (
                f"results can't be written into {training.folder}; they are in {self.run_dir}, "
                f"and the same command writes them later: {_why(error)}"
            )
            self._report(training, problem, error)
            return True
        self._mirror(training)
        return True

    def _mirror(self, training: WatchedTraining) -> None:
        """Sends the store of the training what it lacks of it, if the training has a store."""
        if not training.check_record():
            return
        try:
            uri = RunRecord.read(training.folder).tracking_uri
            if uri and self.is_tracked:
                sync(training.folder, uri)
        except (StoreError, OSError, ValueError) as error:
            problem = (
                f"MLflow does not receive the curves of {training.folder}: {error}. Nothing is "
                f"lost; python -m relloc.sync {training.folder} sends them later"
            )
            self._report(training, problem, error)

    def _report(self, training: WatchedTraining, problem: str, error: Exception) -> None:
        """Prints a problem once; the command ends with an error if it is a damaged file."""
        if isinstance(error, DamagedFile):
            training.report_damage(problem, training.folder)
        else:
            training.report(problem)

    def _report_stopped(self, open_trainings: Sequence[PointStatus]) -> None:
        """Prints each time that nobody runs a training any more though it is not at its end."""
        for status in open_trainings:
            training = self.trainings[status.point.folder]
            if _may_run(status):
                training.is_said_to_wait = False
            elif status.status is not Status.MISSING and not training.is_said_to_wait:
                training.is_said_to_wait = True
                training.check_record()
                console.print_message(f"watch   {_how_it_stands(status)}. It is waited for")

    def _unfinished(self, open_trainings: Sequence[PointStatus]) -> TrainingUnfinished:
        """Returns the error for trainings that are given up."""
        reasons = "; ".join(map(_how_it_stands, open_trainings))
        damage = self._damage()
        evaluated = "All checkpoints that were saved are evaluated"
        if damage:
            evaluated = f"{_damaged(damage)}. All else that was saved is evaluated"
        return TrainingUnfinished(
            f"{quantity(len(open_trainings), 'training')} of {len(self.trainings)} did not come to "
            f"the end, and none was running for {self.watch.patience_min:g} minutes "
            f"(watch_patience_min): {reasons}. {evaluated}; the same command goes on when the "
            "trainings do"
        )

    def raise_if_damaged(self) -> None:
        """Raises `DamagedTraining` if a training has damaged files, which were each printed."""
        damage = self._damage()
        if damage:
            raise DamagedTraining(
                f"{_damaged(damage)}. All else that was saved is evaluated; the same command goes "
                "on once they are mended"
            )

    def _damage(self) -> list[str]:
        """Returns what is damaged of the trainings."""
        damage = [str(error) for error in self.damaged_names]
        for training in self.trainings.values():
            damage += training.damage_left()
        return damage


def _damaged(damage: Sequence[str]) -> str:
    """Returns in words which files of trainings are damaged."""
    return f"Damaged: {'; '.join(damage)}"


def _may_run(status: PointStatus) -> bool:
    """Returns whether a process has a training or will have it, as far as can be known."""
    return status.in_flight or status.status is Status.UNKNOWN


def _why(error: Exception) -> str:
    """Returns why a file can't be written; errors of relloc also say what to do."""
    return str(error) if isinstance(error, UsageError) else reason(error)


def _how_it_stands(status: PointStatus) -> str:
    """Returns in words how far a training is that nobody runs.

    A training whose record or journal is damaged can't be asked how far it is.
    """
    folder = status.point.folder
    try:
        told = unfinished_training(folder)
    except DamagedFile:
        told = ""
    return told or f"{folder} is {status.status.word}"
