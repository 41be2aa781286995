"""Which checkpoints of which trainings are evaluated in which order, and when that ends."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from relloc.checkpoints.backbone_files import BACKBONE_FILE, save_backbone
from relloc.checkpoints.states import save_training
from relloc.errors import DamagedFile, DamagedTraining, TrainingUnfinished, UsageError
from relloc.evaluation.contract import EvaluatedModel
from relloc.models.small import SmallBackbone
from relloc.results import RESULTS_FILE, Result, append_results, read_results
from relloc.runs import build
from relloc.runs.checkpoint_watch import Watch, WatchedTraining
from relloc.runs.command_settings import Evaluating, WatchSettings
from relloc.runs.settings import compose
from relloc.status import Status
from relloc.sweeps.point_status import PointStatus
from relloc.sweeps.points import Point
from relloc.sweeps.sweep import Sweep
from relloc.tracking import RunRecord, write_status
from relloc.tracking.journal import JOURNAL_FILE
from relloc.tracking.record import RUN_FILE
from relloc.tracking.run_lock import FolderIsTaken, locked_run_folder
from relloc.tracking.watched import WATCHED_FILE, read_watched

WIDTHS = [8, 8, 8, 8, 8]
ABOUT = {
    "model": {
        "name": "small",
        "backbone": {"_target_": "relloc.models.small.SmallBackbone", "widths": WIDTHS},
    }
}


class Training:
    """The run folder of a training, as it grows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        RunRecord(name="t", experiment="relloc", tags={"relloc.kind": "train"}).write(folder)
        write_status(folder, "RUNNING")

    def _backbone(self, step: int) -> SmallBackbone:
        torch.manual_seed(step)
        return SmallBackbone(widths=WIDTHS)

    def save(self, step: int, milestone: str | None = None) -> "Training":
        state = self._backbone(step).state_dict()
        model = {f"backbone.{name}": tensor for name, tensor in state.items()}
        content = {"model": model, "about": {**ABOUT, "step": step}}
        save_training(self.folder, content, step, milestone)
        return self

    def finish(self, step: int) -> "Training":
        self.save(step)
        about = {**ABOUT, "step": step}
        save_backbone(self.folder / BACKBONE_FILE, self._backbone(step), about)
        write_status(self.folder, "FINISHED")
        return self


class Measuring:
    """Stands for evaluations: each weights has one number. `then` is called after each."""

    def __init__(self, run_dir: Path) -> None:
        run_dir.mkdir()
        self.run_dir = run_dir
        self.measured: list[str] = []
        self.then: Callable[[], object] = lambda: None

    def measure(self, model: EvaluatedModel) -> set[str]:
        file = Path(model.checkpoint)
        row = Result(
            eval="knn",
            dataset="photos",
            split="held_out",
            layer="feature4",
            metric="top1",
            value=float(len(self.measured)),
            n=40,
            seed=0,
            checkpoint=model.checkpoint,
            model=model.model,
            fingerprint=model.weights,
        )
        # The runner finds weights that were measured under another name.
        known = [
            dataclasses.replace(each, checkpoint=model.checkpoint)
            for each in read_results(self.run_dir)
            if each.fingerprint == model.weights
        ]
        append_results(self.run_dir, known[:1] or [row])
        self.measured.append(f"found {file.name}" if known else file.name)
        self.then()
        return {model.weights}


@pytest.fixture
def measuring(tmp_path: Path) -> Measuring:
    return Measuring(tmp_path / "watcher")


def sweep_of(runs: Path, *names: str) -> Sweep:
    """A sweep with trainings in folders of `runs`, which are added to it if it is there already."""
    sweep = Sweep(runs / "sweeps" / "s")
    points = []
    for name in names:
        words = (f"seed={name}",)
        points.append(
            Point(kind="train", name=name, overrides=words, identity=name, folder=runs / name)
        )
    with sweep.locked():
        sweep.add(points, ["train"])
    return sweep


def damage(training: Training, name: str) -> Path:
    """Damages a file as a full disk or a careless hand does, and returns it."""
    path = training.folder / name
    if name == JOURNAL_FILE:
        entry = '{"time_ms": 1, "step": 1, "metrics": {"train/epoch": 1}}\n'
        path.write_text(f"{entry}{entry[:20]}\n{entry}")
    else:
        path.write_bytes(path.read_bytes()[:-40])
    return path


def watch(measuring: Measuring, *names: Path) -> Watch:
    words = [
        f"watch=[{','.join(map(str, names))}]",
        "watch_every_s=0.001",
        "watch_patience_min=0",
        "eval=[knn]",
        "view={short_px: 64, crop_px: 56}",
        "tracking=none",
    ]
    settings = build.evaluating(compose("evaluate", words).config)
    assert settings.watch is not None
    return Watch(
        settings=settings,
        watch=settings.watch,
        run_dir=measuring.run_dir,
        measure=measuring.measure,
        is_tracked=False,
    )


def steps(training: Training) -> list[int]:
    return [each.step for each in read_watched(training.folder)]


def test_milestones_come_in_their_order_then_the_newest_and_the_end(
    tmp_path: Path, measuring: Measuring
) -> None:
    training = Training(tmp_path / "runs" / "one")
    training.save(10, "epoch_10").save(2, "epoch_2").save(12).save(14)
    later = iter([None, None, lambda: training.save(16, "epoch_16"), lambda: training.finish(20)])

    def go_on() -> None:
        happens = next(later, None)
        if happens:
            happens()

    measuring.then = go_on
    watch(measuring, training.folder).to_the_end()
    # After step 16 there are a milestone and the newest, of the same weights.
    files = ["epoch_2.pt", "epoch_10.pt", "step_000000014.pt", "epoch_16.pt", BACKBONE_FILE]
    assert measuring.measured == files
    assert steps(training) == [2, 10, 14, 16, 20]
    # What was measured of the weights at the end is a result of the training.
    [final] = read_results(training.folder)
    assert Path(final.checkpoint) == training.folder / BACKBONE_FILE
    assert final.measured_in == str(measuring.run_dir)

    # Once more, as after its own restart: everything is found, and noted once.
    watch(measuring, training.folder).to_the_end()
    assert steps(training) == [2, 10, 14, 16, 20]
    assert read_results(training.folder) == [final]


def test_the_newest_weights_are_those_of_the_end_under_another_name(
    tmp_path: Path, measuring: Measuring
) -> None:
    training = Training(tmp_path / "one").save(20)
    measuring.then = lambda: training.finish(20) if len(measuring.measured) == 1 else None
    watch(measuring, training.folder).to_the_end()
    assert measuring.measured == ["step_000000020.pt", f"found {BACKBONE_FILE}"]
    assert steps(training) == [20]
    assert len(read_results(training.folder)) == 1


def test_a_training_that_died_is_said_to_have_and_its_checkpoints_are_evaluated(
    tmp_path: Path, measuring: Measuring, capsys: pytest.CaptureFixture[str]
) -> None:
    dead = Training(tmp_path / "dead").save(6)
    ended = Training(tmp_path / "ended").finish(8)
    with pytest.raises(TrainingUnfinished, match=r"1 training of 2 .*dead was stopped at step 6"):
        watch(measuring, dead.folder, ended.folder).to_the_end()
    assert measuring.measured == ["step_000000006.pt", BACKBONE_FILE]
    assert "dead was stopped at step 6" in capsys.readouterr().out


def test_a_training_that_runs_is_waited_for(
    tmp_path: Path, measuring: Measuring, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(tmp_path / "one")
    looks = 0

    def sleep(_seconds: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            training.finish(4)
        assert looks < 9

    monkeypatch.setattr("relloc.runs.checkpoint_watch.time.sleep", sleep)
    # Held by this process, which is_held tells as it tells another. Its results can't be given to
    # it as long as it has the folder, and so it is not at its end.
    with locked_run_folder(training.folder), pytest.raises(AssertionError):
        watch(measuring, training.folder).to_the_end()
    assert looks == 9
    assert measuring.measured == [BACKBONE_FILE]
    assert read_results(training.folder) == []


@pytest.mark.parametrize("n_taken", [1, 3, 10])
def test_results_are_given_when_a_second_watcher_has_left_the_folder(
    tmp_path: Path,
    measuring: Measuring,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    n_taken: int,
) -> None:
    training = Training(tmp_path / "one").finish(4)
    tries = 0

    def locked(folder: Path) -> contextlib.AbstractContextManager[None]:
        nonlocal tries
        tries += 1
        if tries <= n_taken:
            raise FolderIsTaken("another has it")
        return locked_run_folder(folder)

    monkeypatch.setattr("relloc.runs.checkpoint_watch.locked_run_folder", locked)
    watch(measuring, training.folder).to_the_end()
    # After ten tries that is reported, and the command ends.
    is_given_up = n_taken == 10
    assert tries == (10 if is_given_up else n_taken + 1)
    assert len(read_results(training.folder)) == (0 if is_given_up else 1)
    assert ("another has it" in capsys.readouterr().out) == is_given_up


@pytest.mark.parametrize("name", [WATCHED_FILE, RESULTS_FILE])
def test_a_damaged_file_of_a_training_does_not_end_the_others(
    tmp_path: Path, measuring: Measuring, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    damaged = Training(tmp_path / "damaged").save(2, "epoch_2").finish(4)
    (damaged.folder / name).write_text('{"step": "x"}\n')
    whole = Training(tmp_path / "whole").finish(4)
    watch(measuring, damaged.folder, whole.folder).to_the_end()
    assert measuring.measured.count("epoch_2.pt") == 1
    assert steps(whole) == [4]
    assert len(read_results(whole.folder)) == 1
    assert capsys.readouterr().out.count(f"{name} line 1") == 1

    # Once it is mended, the same command writes what it lacks.
    (damaged.folder / name).unlink()
    watch(measuring, damaged.folder, whole.folder).to_the_end()
    assert set(steps(damaged)) == {2, 4}
    assert len(set(read_results(damaged.folder))) == 1


@pytest.mark.parametrize("name", [RUN_FILE, JOURNAL_FILE])
def test_a_stopped_training_with_a_damaged_file_is_told_once_and_others_are_watched(
    tmp_path: Path, measuring: Measuring, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    stopped = Training(tmp_path / "stopped").save(2)
    path = damage(stopped, name)
    whole = Training(tmp_path / "whole").save(2, "epoch_2").save(4)
    measuring.then = lambda: whole.finish(6) if len(measuring.measured) == 3 else None
    sweep = sweep_of(tmp_path, "stopped", "whole")
    # With the others at their end it is given up as any that is stopped.
    with pytest.raises(TrainingUnfinished, match=rf"1 training of 2 .*{path} .*[Pp]ut back a copy"):
        watch(measuring, sweep.folder).to_the_end()
    assert (steps(stopped), steps(whole)) == ([2], [2, 4, 6])
    assert capsys.readouterr().out.count(str(path)) == 1


@pytest.mark.parametrize("name", [RUN_FILE, JOURNAL_FILE, "checkpoints/epoch_2.pt", BACKBONE_FILE])
def test_a_damaged_file_of_an_ended_training_is_told_once_and_is_an_error_at_the_end(
    tmp_path: Path, measuring: Measuring, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    damaged = Training(tmp_path / "damaged").save(2, "epoch_2").finish(4)
    path = damage(damaged, name)
    whole = Training(tmp_path / "whole").finish(4)
    sweep = sweep_of(tmp_path, "damaged", "whole")
    watching = watch(measuring, sweep.folder)
    watching.to_the_end()
    assert len(read_results(whole.folder)) == 1
    # What is not damaged itself is evaluated.
    left_out = {"checkpoints/epoch_2.pt": [4], BACKBONE_FILE: [2]}
    assert steps(damaged) == left_out.get(name, [2, 4])
    output = capsys.readouterr().out
    assert len([line for line in output.splitlines() if f"{path} " in line]) == 1
    with pytest.raises(DamagedTraining, match=rf"{path} .*[Pp]ut back a copy"):
        watching.raise_if_damaged()

    # A sound training alone is none.
    alone = watch(measuring, whole.folder)
    alone.to_the_end()
    alone.raise_if_damaged()


def test_a_named_run_without_a_readable_record_is_an_error_at_the_end_or_at_once(
    tmp_path: Path, measuring: Measuring, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = Training(tmp_path / "damaged").finish(4)
    path = damage(damaged, RUN_FILE)
    whole = Training(tmp_path / "whole").save(2, "epoch_2").finish(4)
    watching = watch(measuring, damaged.folder, whole.folder)
    watching.to_the_end()
    assert steps(whole) == [2, 4]
    assert capsys.readouterr().out.count(f"{path} is not a run record") == 1
    with pytest.raises(DamagedTraining, match=str(path)):
        watching.raise_if_damaged()
    with pytest.raises(DamagedFile, match=str(path)):
        watch(measuring, damaged.folder).to_the_end()


def test_a_training_whose_network_an_evaluation_refuses_is_left_out(
    tmp_path: Path,
    measuring: Measuring,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def check(models: list[EvaluatedModel], _settings: Evaluating) -> None:
        if "refused" in models[0].checkpoint:
            raise UsageError("another model= is needed")

    monkeypatch.setattr("relloc.runs.checkpoint_watch.check_networks", check)
    refused = Training(tmp_path / "refused").save(2, "epoch_2").finish(4)
    fits = Training(tmp_path / "fits").finish(4)
    watch(measuring, refused.folder, fits.folder).to_the_end()
    assert measuring.measured == [BACKBONE_FILE]
    assert steps(fits) == [4]
    assert steps(refused) == []
    assert capsys.readouterr().out.count(f"{refused.folder} is left out") == 1
    # Where there is no other, that is the error of the command.
    with pytest.raises(UsageError, match="model="):
        watch(measuring, refused.folder).to_the_end()


def test_a_silent_scheduler_is_reported_once_and_asked_again(
    tmp_path: Path,
    measuring: Measuring,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    training = Training(tmp_path / "one").save(6)
    looks = 0

    def statuses(points: list[Point]) -> tuple[list[PointStatus], list[str]]:
        nonlocal looks
        looks += 1
        if looks == 5:
            training.finish(8)
        status = Status.UNKNOWN if looks < 5 else Status.DONE
        silence = ["squeue does not answer"] if looks < 5 else []
        return [PointStatus(point=point, status=status) for point in points], silence

    monkeypatch.setattr("relloc.runs.checkpoint_watch.point_statuses_and_problems", statuses)
    watch(measuring, training.folder).to_the_end()
    assert steps(training) == [6, 8]
    output = capsys.readouterr().out
    assert output.count("squeue does not answer") == 1
    assert "waited for" not in output


def test_points_of_a_sweep_may_begin_later(tmp_path: Path, measuring: Measuring) -> None:
    runs = tmp_path / "runs"
    sweep = sweep_of(runs, "a", "b")
    a = Training(runs / "a").save(2, "epoch_2").finish(4)
    begun: list[Training] = []

    def go_on() -> None:
        if len(measuring.measured) == 1:
            sweep_of(runs, "c")
            begun.extend(Training(runs / name).finish(5) for name in "bc")

    measuring.then = go_on
    watch(measuring, sweep.folder).to_the_end()
    # One of each training in turn.
    assert sorted(measuring.measured[1:3]) == [BACKBONE_FILE] * 2
    assert [steps(training) for training in (a, *begun)] == [[2, 4], [5], [5]]


def test_a_checkpoint_that_is_deleted_or_damaged_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = Training(tmp_path / "one").save(2, "epoch_2").save(4)
    checkpoints = training.folder / "checkpoints"
    with (checkpoints / "epoch_2.pt").open("r+b") as file:
        file.truncate(100)
    watched = WatchedTraining(folder=training.folder)
    found = watched.next_checkpoint()
    assert found is not None
    assert found.step == 4
    assert capsys.readouterr().out.count("epoch_2.pt is damaged") == 1
    found.path.unlink()
    watched.leave_out(found.path, "gone")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("problem", ["missing", "empty", "evaluation", "sweep of evaluations"])
def test_what_is_no_training_is_refused(tmp_path: Path, problem: str) -> None:
    name = tmp_path / "x"
    if problem == "empty":
        name.mkdir()
    elif problem == "evaluation":
        name.mkdir()
        RunRecord(name="e", experiment="relloc", tags={"relloc.kind": "evaluate"}).write(name)
    elif problem == "sweep of evaluations":
        sweep = Sweep(name)
        with sweep.locked():
            point = Point(kind="evaluate", name="", overrides=(), identity="", folder=name / "p")
            sweep.add([point], [])
    with pytest.raises(UsageError, match=f"^watch={name} "):
        WatchSettings(names=[str(name)], every_s=1, patience_min=1).trainings()
