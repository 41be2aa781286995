"""Whatever stops a pretraining, the same command goes on, and ends with the same bits."""

import contextlib
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import Command, Hold, descendants, start
from noise_folder import write_noise
from safetensors.torch import load_file
from tiny import TINY

from relloc.checkpoints.backbone_files import BACKBONE_FILE
from relloc.checkpoints.states import load_training, saved_trainings
from relloc.results import read_results
from relloc.tracking import open_store, read_journal, read_note, search

STEPS_PER_EPOCH, EPOCHS = 4, 15
STEPS = STEPS_PER_EPOCH * EPOCHS
REPORT_EVERY = 3
REPORT = "relloc.tracking.journal:Journal.log"
# Before its last but one report a training waits for what a test does to it, which comes before in
# most cases: a busy machine may run the training alone for seconds.
NEAR_THE_END = Hold(function=REPORT, of="step", least=STEPS - REPORT_EVERY)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Small files of noise, and all that is random: jitter, dropped colors, dropout."""
    root = write_noise(tmp_path_factory.mktemp("images"))
    return (
        *(word for word in TINY if not word.startswith("data.source")),
        *(
            "device=cpu",
            "data=folder",
            f"data.root={root}",
            "recipe.images_per_batch_norm=8",
            "optimizer.lr=2",
            "color=drop",
        ),
        *(
            "model.backbone.widths=[8,8,8,8,8]",
            "model.head.hidden_dim=16",
            "model.head.dropout=0.5",
        ),
        *(
            f"schedule.epochs={EPOCHS}",
            "schedule.milestone_epochs=[10]",
            "schedule.warmup_epochs=2",
        ),
        *(
            f"report_every_steps={REPORT_EVERY}",
            "monitor.every_epochs=null",
            "tracking=none",
            "eval=[]",
        ),
    )


def start_training(
    folder: Path, *settings: str, processes: int = 1, hold: Hold | None = None
) -> Command:
    """The run folder is `folder / "run"`."""
    return start(
        "relloc.train",
        *settings,
        f"hydra.run.dir={folder / 'run'}",
        folder=folder,
        processes=processes,
        hold=hold,
    )


def train(folder: Path, *settings: str, processes: int = 1) -> Path:
    """Train to the end; the run folder."""
    command = start_training(folder, *settings, processes=processes)
    assert command.wait() == 0, command.text
    return folder / "run"


@pytest.fixture(scope="module")
def undisturbed(
    settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """The run folder of a training by so many processes that nothing stopped."""

    @functools.cache
    def run(processes: int = 1) -> Path:
        return train(tmp_path_factory.mktemp("undisturbed"), *settings, processes=processes)

    return run


@pytest.fixture(scope="module")
def killed_half_way(settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a training that saved each step and was killed; copy it."""
    folder = tmp_path_factory.mktemp("killed")
    # It is killed while no checkpoint is being written: then there are three for a moment.
    hold = Hold(function=REPORT, of="step", least=STEPS // 4)
    command = start_training(folder, *settings, "save_every_s=0", hold=hold)
    assert command.wait_for(lambda: command.is_held), command.text
    assert command.kill() == -signal.SIGKILL
    assert len(saved_trainings(folder / "run")) == 2
    return folder / "run"


def copied(run_dir: Path, folder: Path) -> Path:
    return shutil.copytree(run_dir, folder / "run")


def reported(run_dir: Path) -> int:
    """The last step that the journal has."""
    entries = read_journal(run_dir)
    return entries[-1].step if entries else 0


def told_of_training(run_dir: Path) -> list[tuple[int, dict[str, float]]]:
    """What the journal tells of each step, without speeds."""
    entries = [entry for entry in read_journal(run_dir) if "train/loss" in entry.metrics]
    return [
        (
            entry.step,
            {name: value for name, value in entry.metrics.items() if name.startswith("train/")},
        )
        for entry in entries
    ]


def status(run_dir: Path) -> str:
    return json.loads((run_dir / "status.json").read_text())["status"]


def assert_same_run(one: Path, other: Path) -> None:
    """To the bit: weights, running statistics, optimizer, sums, journal and held-out answers."""
    assert (one / BACKBONE_FILE).read_bytes() == (other / BACKBONE_FILE).read_bytes()
    last = [torch.load(saved_trainings(run_dir)[-1], weights_only=True) for run_dir in (one, other)]
    for part in ("step", "model", "optimizer", "tallies"):
        torch.testing.assert_close(last[0][part], last[1][part], rtol=0, atol=0)
    assert told_of_training(one) == told_of_training(other)
    held_out = [(row.eval, row.value, row.low, row.high, row.n) for row in read_results(one)]
    assert held_out == [
        (row.eval, row.value, row.low, row.high, row.n) for row in read_results(other)
    ]


def learned(run_dir: Path) -> dict[str, torch.Tensor]:
    """The backbone's weights without running statistics."""
    return {
        name: value
        for name, value in load_file(run_dir / BACKBONE_FILE).items()
        if "running" not in name and "num_batches" not in name
    }


@pytest.mark.parametrize(
    ("workers", "processes", "save_every_s", "kills"),
    [(0, 1, 0, 3), (2, 1, 0.3, 3), (2, 2, 0, 2)],
    ids=["alone", "two workers, steps done again", "two processes of two workers"],
)
def test_a_run_killed_at_random_moments_ends_with_the_bits_of_one_never_stopped(
    tmp_path: Path,
    settings: tuple[str, ...],
    undisturbed: Callable[..., Path],
    workers: int,
    processes: int,
    save_every_s: float,
    kills: int,
) -> None:
    straight = undisturbed(processes)
    seed = random.randrange(1_000_000)
    print("seed of the moments:", seed)  # shown where the test fails
    chance = random.Random(seed)
    line = (*settings, f"workers={workers}", f"save_every_s={save_every_s}")
    for reports in sorted(chance.sample(range(1, STEPS // REPORT_EVERY * 2 // 3), kills)):
        command = start_training(tmp_path, *line, processes=processes, hold=NEAR_THE_END)
        reached = reports * REPORT_EVERY
        assert command.wait_for(lambda at=reached: reported(tmp_path / "run") >= at), command.text
        time.sleep(chance.uniform(0, 0.1))
        assert command.kill() == -signal.SIGKILL
    assert_same_run(train(tmp_path, *line, processes=processes), straight)
    assert "resume" in (tmp_path / f"output_{kills}.txt").read_text()
    assert [step for step, _ in told_of_training(straight)] == list(
        range(REPORT_EVERY, STEPS + 1, REPORT_EVERY)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_killed_run_ends_with_the_same_bits_on_a_gpu_with_deterministic_settings(
    tmp_path: Path, settings: tuple[str, ...], compiled: bool
) -> None:
    line = (
        *settings,
        "device=cuda",
        "deterministic=true",
        f"compile={compiled}",
        "workers=2",
        "save_every_s=0",
    )
    folders = tmp_path / "straight", tmp_path / "killed"
    for folder in folders:
        folder.mkdir()
    straight = train(folders[0], *line)
    command = start_training(folders[1], *line)
    assert command.wait_for(lambda: reported(folders[1] / "run") >= STEPS // 2), command.text
    assert command.kill() == -signal.SIGKILL
    assert_same_run(train(folders[1], *line), straight)


def test_a_killed_run_stays_one_run_in_mlflow(tmp_path: Path, settings: tuple[str, ...]) -> None:
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    client = open_store(uri)
    line = (*settings, "tracking=sqlite", "save_every_s=0.1")
    command = start_training(tmp_path, *line, hold=NEAR_THE_END)
    run_dir = tmp_path / "run"
    assert command.wait_for(lambda: read_note(run_dir) and reported(run_dir)), command.text
    assert command.kill() == -signal.SIGKILL
    assert reported(run_dir) < STEPS
    train(tmp_path, *line)
    (tracked,) = search(uri, "relloc")
    assert tracked["status"] == "FINISHED"
    history = client.get_metric_history(tracked["run_id"], "train/loss")
    found = sorted((point.step, point.value) for point in history)
    assert found == [(step, metrics["train/loss"]) for step, metrics in told_of_training(run_dir)]
    assert [step for step, _ in found] == list(range(REPORT_EVERY, STEPS + 1, REPORT_EVERY))


@pytest.mark.parametrize(
    ("name", "workers"), [("SIGUSR1", 2), ("SIGUSR2", 0), ("SIGTERM", 2), ("SIGHUP", 2)]
)
def test_a_signal_ends_the_step_saves_and_the_same_command_goes_on(
    tmp_path: Path,
    settings: tuple[str, ...],
    undisturbed: Callable[..., Path],
    name: str,
    workers: int,
) -> None:
    straight, run_dir, line = undisturbed(), tmp_path / "run", (*settings, f"workers={workers}")
    command = start_training(tmp_path, *line, hold=NEAR_THE_END)
    assert command.wait_for(lambda: reported(run_dir)), command.text
    for pid in [command.pid, *descendants(command.pid)]:  # as a cluster does
        os.kill(pid, signal.Signals[name])
    command.go_on()
    assert command.wait() == 128 + signal.Signals[name], command.text
    (saved,) = saved_trainings(run_dir)
    step = load_training(saved)["step"]
    assert step < STEPS
    assert re.search(rf"{name}: .*\bstep {step} of {STEPS}\b.*saved", command.text)
    assert status(run_dir) == "KILLED"
    assert_same_run(train(tmp_path, *line), straight)
    assert status(run_dir) == "FINISHED"


def test_sigterm_while_evaluating_ends_at_once_and_the_same_command_goes_on(
    tmp_path: Path, settings: tuple[str, ...]
) -> None:
    line = (
        *settings,
        "schedule.epochs=1",
        "schedule.milestone_epochs=[]",
        "schedule.warmup_epochs=0",
        "eval=[linear_fast]",
    )
    line = (*line, "probe.linear.epochs=150")
    hold = Hold(function="relloc.runs.measuring:_save_part", least=1)
    command = start_training(tmp_path, *line, hold=hold)
    assert command.wait_for(lambda: "eval    linear" in command.text), command.text
    os.kill(command.pid, signal.SIGTERM)
    command.go_on()
    assert command.wait() == 143, command.text
    assert status(tmp_path / "run") == "KILLED"
    assert {row.eval for row in read_results(tmp_path / "run")} == {"pretext"}
    run_dir = train(tmp_path, *line)
    assert {row.checkpoint for row in read_results(run_dir) if row.eval == "linear_fast"} == {
        *("random", str(run_dir / BACKBONE_FILE))
    }


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_newest_checkpoint_is_noticed_and_the_one_before_used(
    tmp_path: Path,
    settings: tuple[str, ...],
    undisturbed: Callable[..., Path],
    killed_half_way: Path,
) -> None:
    straight, run_dir = undisturbed(), copied(killed_half_way, tmp_path)
    before, newest = saved_trainings(run_dir)
    flip_a_byte(newest)
    command = start_training(tmp_path, *settings)
    assert command.wait() == 0, command.text
    assert f"{newest} is damaged" in command.text
    assert f"resume  {before} after step" in command.text
    assert_same_run(run_dir, straight)


def test_only_damaged_checkpoints_end_in_one_message(
    tmp_path: Path, settings: tuple[str, ...], killed_half_way: Path
) -> None:
    run_dir = copied(killed_half_way, tmp_path)
    for path in saved_trainings(run_dir):
        flip_a_byte(path)
    for _ in range(2):  # a launcher may start it again
        command = start_training(tmp_path, *settings)
        assert command.wait() == 2, command.text
        assert f"relloc: no checkpoint in {run_dir / 'checkpoints'} " in command.text
        assert "Traceback" not in command.text
        assert not (run_dir / BACKBONE_FILE).exists()


def test_milestones_stay_and_can_be_evaluated(tmp_path: Path, settings: tuple[str, ...]) -> None:
    line = (
        *settings,
        "schedule.epochs=3",
        "schedule.milestone_epochs=[]",
        "save_every_s=0",
        "milestones=[1,1.5]",
    )
    run_dir = train(tmp_path, *line)
    kept = run_dir / "checkpoints"
    names = {"epoch_1.pt", "epoch_1.5.pt", "step_000000011.pt", "step_000000012.pt"}
    assert {path.name for path in kept.iterdir()} == {*names, *(f"{name}.sha256" for name in names)}
    sums = [path.name for path in kept.glob("*.sha256")]
    checked = subprocess.run(
        ["sha256sum", "--check", *sums], cwd=kept, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout
    assert checked.stdout.count(": OK") == 4
    assert load_training(kept / "epoch_1.pt")["step"] == STEPS_PER_EPOCH
    assert load_training(kept / "epoch_1.5.pt")["step"] == 6

    data = [word for word in settings if word.startswith(("data=", "data.root=", "view."))]
    line = (*data, f"checkpoint={kept / 'epoch_1.pt'}", "eval=[knn]", "tracking=none")
    command = start(
        "relloc.evaluate", *line, f"hydra.run.dir={tmp_path / 'evaluated'}", folder=tmp_path
    )
    assert command.wait() == 0, command.text
    assert {row.checkpoint for row in read_results(tmp_path / "evaluated")} == {
        str(kept / "epoch_1.pt")
    }


def test_a_milestone_outside_the_run_is_refused(tmp_path: Path, settings: tuple[str, ...]) -> None:
    command = start_training(tmp_path, *settings, "milestones=[99]")
    assert command.wait() == 2, command.text
    assert re.search(rf"relloc: milestones=\[99\]: .*\b99\b.*\b{EPOCHS}\b", command.text)
    assert "Traceback" not in command.text
    assert not (tmp_path / "run" / "journal.jsonl").exists()


@pytest.mark.parametrize(
    "neutral",
    [
        ("workers=2", "report_every_steps=7", "save_every_s=0.2"),
        ("tracking=sqlite", "monitor.every_epochs=2", "monitor.most_share=1"),
    ],
    ids=" ".join,
)
def test_settings_that_change_nothing_give_the_same_bits(
    tmp_path: Path,
    settings: tuple[str, ...],
    undisturbed: Callable[..., Path],
    neutral: tuple[str, ...],
) -> None:
    straight = undisturbed()
    run_dir = train(tmp_path, *settings, *neutral)
    assert (run_dir / BACKBONE_FILE).read_bytes() == (straight / BACKBONE_FILE).read_bytes()


def test_two_processes_compute_what_one_does_that_accumulates(
    undisturbed: Callable[..., Path],
) -> None:
    """To the bit: a step's gradient is the mean of two, whose sum has but one order.

    Running statistics are those of rank 0's ghost batches, half as many, and so differ.
    """
    alone, two = undisturbed(1), undisturbed(2)
    assert all(torch.equal(value, learned(two)[name]) for name, value in learned(alone).items())
    every, half = (load_file(run_dir / BACKBONE_FILE) for run_dir in (alone, two))
    for name in every:
        if "running" in name:
            assert not torch.equal(every[name], half[name])
        if "num_batches" in name:
            assert every[name] == 2 * half[name]


def test_a_step_in_one_forward_is_that_of_two_but_for_rounding(
    tmp_path: Path, settings: tuple[str, ...]
) -> None:
    """The gradients of neighbors and centers of two ghost batches are added in another order.
    An epoch moves weights by 1e-3 and more; float32 rounds them to 6e-8 of their size, and so much
    each step.
    """
    short = (
        *settings,
        "schedule.epochs=1",
        "schedule.milestone_epochs=[]",
        "schedule.warmup_epochs=0",
    )
    runs = []
    for images in (8, 16):
        folder = tmp_path / str(images)
        folder.mkdir()
        runs.append(learned(train(folder, *short, f"images_per_forward={images}")))
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lr", ["1e6", "1e20"])  # statistics overflow first, or weights
def test_divergence_stops_the_run_and_names_the_last_good_checkpoint(
    tmp_path: Path, settings: tuple[str, ...], lr: str
) -> None:
    command = start_training(
        tmp_path, *settings, "schedule.warmup_epochs=0", f"optimizer.lr={lr}", "save_every_s=0"
    )
    assert command.wait() == 2, command.text
    assert "relloc: training diverged: " in command.text
    assert "Traceback" not in command.text
    saved = saved_trainings(tmp_path / "run")
    assert saved
    assert f"last good checkpoint is {saved[-1]}" in command.text
    for path in saved:
        state = load_training(path)
        momenta = [value["momentum_buffer"] for value in state["optimizer"]["state"].values()]
        for value in [*state["model"].values(), *momenta, state["tallies"]]:
            assert value.isfinite().all()
    assert status(tmp_path / "run") == "FAILED"


def test_divergence_before_anything_was_saved_says_so(
    tmp_path: Path, settings: tuple[str, ...]
) -> None:
    command = start_training(tmp_path, *settings, "optimizer.lr=1e20")
    assert command.wait() == 2, command.text
    assert re.search(r"relloc: training diverged: .*\bnan\b.*\bstep 3\b", command.text)
    assert "no checkpoint" in command.text
    assert not saved_trainings(tmp_path / "run")


def test_a_killed_loader_worker_ends_in_one_message_and_the_same_command_goes_on(
    tmp_path: Path, settings: tuple[str, ...], undisturbed: Callable[..., Path]
) -> None:
    straight, line = undisturbed(), (*settings, "workers=2", "save_every_s=0.1")
    # Not so near the end that its images have all been read.
    hold = Hold(function=REPORT, of="step", least=STEPS // 2)
    command = start_training(tmp_path, *line, hold=hold)
    assert command.wait_for(lambda: reported(tmp_path / "run")), command.text
    os.kill(descendants(command.pid)[0], signal.SIGKILL)
    command.go_on()
    assert command.wait() == 75, command.text  # EX_TEMPFAIL: the same command may well succeed
    assert re.search(r"^relloc: .*killed", command.text, re.MULTILINE)
    assert "Traceback" not in command.text
    assert status(tmp_path / "run") == "FAILED"
    assert_same_run(train(tmp_path, *line), straight)


@pytest.mark.parametrize("images_per_forward", [8, 16])
def test_a_signal_is_heard_while_images_do_not_come(
    tmp_path: Path, settings: tuple[str, ...], images_per_forward: int
) -> None:
    line, run_dir = (
        (*settings, "workers=2", f"images_per_forward={images_per_forward}"),
        tmp_path / "run",
    )
    hold = Hold(function=REPORT, of="step", least=STEPS // 2)
    command = start_training(tmp_path, *line, hold=hold)
    assert command.wait_for(lambda: reported(run_dir)), command.text
    for pid in descendants(command.pid):  # as a disk that is gone would
        os.kill(pid, signal.SIGSTOP)
    command.go_on()
    time.sleep(0.5)  # what was ready is used up
    os.kill(command.pid, signal.SIGTERM)
    assert command.wait() == 143, command.text
    assert "SIGTERM: stopped after step" in command.text
    assert "Traceback" not in command.text
    assert status(run_dir) == "KILLED"
    if (
        images_per_forward == 16
    ):  # a step in one forward: what waits for images stands between two steps
        assert "everything is saved" in command.text
        assert len(saved_trainings(run_dir)) == 1
        (tmp_path / "straight").mkdir()
        assert_same_run(train(tmp_path, *line), train(tmp_path / "straight", *line))


def test_a_signal_is_heard_while_an_evaluations_images_do_not_come(
    tmp_path: Path, settings: tuple[str, ...]
) -> None:
    data = [word for word in settings if word.startswith(("data=", "data.root=", "view."))]
    line = (
        *data,
        "checkpoint=random",
        "model=small",
        "eval=[linear_fast]",
        "workers=2",
        "view.batch=1",
        "tracking=none",
    )
    command = start("relloc.evaluate", *line, f"hydra.run.dir={tmp_path / 'run'}", folder=tmp_path)
    assert command.wait_for(lambda: len(descendants(command.pid)) >= 2), command.text
    for pid in descendants(command.pid):
        with contextlib.suppress(
            ProcessLookupError
        ):  # git, which tells of the commit, ends by itself
            os.kill(pid, signal.SIGSTOP)
    os.kill(command.pid, signal.SIGTERM)
    assert command.wait() == 143, command.text
    assert "Traceback" not in command.text
