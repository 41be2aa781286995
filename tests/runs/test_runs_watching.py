"""Tests the curves, progress and monitors of a training."""

import contextlib
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from relloc.data.loader import Unreadable
from relloc.data.order import StepPlan
from relloc.errors import DataError
from relloc.pretext.alarm import Diverged
from relloc.pretext.feed import Feed
from relloc.pretext.loop import Progress, Task
from relloc.pretext.questions import CENTER_PAIRS
from relloc.pretext.schedule import Constant
from relloc.runs.folder import RunFolder
from relloc.runs.monitors import confusion_picture
from relloc.runs.watching import Monitoring, reporting
from relloc.tracking import list_artifacts_to_send, read_journal

PLAN = StepPlan(n_images=64, images_per_step=16, images_per_batch_norm=8)


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    stopped = Clock()
    monkeypatch.setattr(time, "monotonic", stopped)
    monkeypatch.setattr("relloc.runs.console._last_line", {})  # of other tests, by the real clock
    return stopped


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """With the pictures that monitors draw."""
    for step in range(601):
        picture = tmp_path / confusion_picture(step)
        picture.parent.mkdir(exist_ok=True)
        picture.write_bytes(b"a picture")
    return RunFolder(tmp_path, None)


@pytest.fixture
def stub_task() -> Task:
    """Eight steps"""
    return task_of(epochs=2)


def task_of(epochs: int) -> Task:
    """Four steps an epoch; of a task, only its length and its questions are looked at."""
    task = object.__new__(Task)
    fields = {
        "schedule": Constant(epochs=epochs),
        "steps_per_epoch": 4,
        "model": SimpleNamespace(questions=CENTER_PAIRS),
    }
    for name, value in fields.items():
        object.__setattr__(task, name, value)
    return task


class Asked:
    """Monitors that take `cost_s` of the clock, and remember when they were asked."""

    def __init__(self, clock: Clock, cost_s: float = 0.0) -> None:
        self.clock = clock
        self.cost_s = cost_s
        self.at: list[int] = []

    def __call__(self, step: int) -> dict[str, float]:
        self.at.append(step)
        self.clock.now += self.cost_s
        return {"monitor/pretext/top1": 10.0 + step}


def walk(monitoring: Monitoring, clock: Clock, *, steps: int, step_s: float) -> None:
    for done in range(1, steps + 1):
        clock.now += step_s
        monitoring.after_step(done)


def test_monitors_are_asked_at_their_period_and_journaled_by_step(
    clock: Clock, folder: RunFolder
) -> None:
    asked = Asked(clock)
    walk(
        Monitoring(
            asked, every_steps=3, most_share=0.05, folder=folder, device=torch.device("cpu")
        ),
        clock,
        steps=10,
        step_s=1,
    )
    assert asked.at == [3, 6, 9]
    assert [(entry.step, entry.metrics) for entry in read_journal(folder.path)] == [
        (step, {"monitor/pretext/top1": 10.0 + step}) for step in (3, 6, 9)
    ]


def test_monitors_that_fail_end_themselves_and_not_the_training(
    clock: Clock, folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[int] = []

    def broken(done: int) -> dict[str, float]:
        asked.append(done)
        raise DataError("none of the images can be used")

    monitoring = Monitoring(
        broken, every_steps=1, most_share=1, folder=folder, device=torch.device("cpu")
    )
    walk(monitoring, clock, steps=5, step_s=1)
    assert asked == [1]
    assert "none of the images can be used" in capsys.readouterr().out


def test_the_picture_is_kept_for_the_tracker(clock: Clock, folder: RunFolder) -> None:
    walk(
        Monitoring(
            Asked(clock), every_steps=2, most_share=1, folder=folder, device=torch.device("cpu")
        ),
        clock,
        steps=2,
        step_s=1,
    )
    assert list_artifacts_to_send(folder.path) == [confusion_picture(2)]


@pytest.mark.parametrize("most_share", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("cost_s", [0.01, 0.4, 3.0])
def test_slow_monitors_are_left_out_until_they_cost_no_more_than_their_share(
    clock: Clock, folder: RunFolder, cost_s: float, most_share: float
) -> None:
    asked = Asked(clock, cost_s)
    walk(
        Monitoring(
            asked, every_steps=2, most_share=most_share, folder=folder, device=torch.device("cpu")
        ),
        clock,
        steps=600,
        step_s=1,
    )
    if most_share == 1:
        assert len(asked.at) == 300
    else:
        trained_s = 600.0
        run_s = trained_s + len(asked.at) * cost_s
        # What the first turn costs is not known before, so it may exceed the share.
        assert len(asked.at) * cost_s <= most_share * run_s + cost_s
        possible = min(300, most_share / (1 - most_share) * trained_s / cost_s)
        assert len(asked.at) >= 0.6 * possible  # and not more is left out than has to be
    assert all(step % 2 == 0 for step in asked.at)


def test_a_turn_left_out_leaves_no_line(clock: Clock, folder: RunFolder) -> None:
    asked = Asked(clock, cost_s=100)
    walk(
        Monitoring(
            asked, every_steps=1, most_share=0.05, folder=folder, device=torch.device("cpu")
        ),
        clock,
        steps=50,
        step_s=1,
    )
    assert asked.at == [1]
    assert [entry.step for entry in read_journal(folder.path)] == [1]


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_monitors_may_use_any_kernel_and_training_gets_its_own_back(
    clock: Clock, folder: RunFolder, deterministic: bool, fails: bool
) -> None:
    seen = []

    def monitors(_step: int) -> dict[str, float]:
        seen.append(torch.are_deterministic_algorithms_enabled())
        if fails:
            raise KeyError
        return {"monitor/a": 1.0}

    monitoring = Monitoring(
        monitors, every_steps=1, most_share=1, folder=folder, device=torch.device("cpu")
    )
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        if fails:
            with pytest.raises(KeyError):
                monitoring.after_step(1)
        else:
            monitoring.after_step(1)
        assert seen == [False]
        assert torch.are_deterministic_algorithms_enabled() == deterministic
    finally:
        torch.use_deterministic_algorithms(before)


def progress(step: int, loss: float) -> Progress:
    return Progress(step=step, epoch=step / 4, loss=loss, top1=20.0, lr=0.1)


def waiting_feed() -> Feed:
    unreadable = Unreadable(n_images=1, most_share=0)
    return Feed(
        [], unreadable, images_per_batch=1, batches_per_forward=1, device=torch.device("cpu")
    )


def reporting_of(
    task: Task,
    feed: Feed,
    *,
    first_step: int = 0,
    collapse_steps: int = 100,
    folder: RunFolder | None,
    paused_s: Callable[[], float] = lambda: 0.0,
) -> contextlib.AbstractContextManager[Callable[[Progress], None]]:
    return reporting(
        task,
        PLAN,
        feed,
        first_step=first_step,
        collapse_steps=collapse_steps,
        folder=folder,
        paused_s=paused_s,
    )


def test_a_report_is_journaled_with_its_rate_and_the_share_of_waiting(
    clock: Clock, folder: RunFolder, stub_task: Task, capsys: pytest.CaptureFixture[str]
) -> None:
    feed = waiting_feed()
    with reporting_of(stub_task, feed, first_step=2, collapse_steps=100, folder=folder) as report:
        clock.now, feed.waited_s = 4.0, 1.0
        report(progress(4, 1.5))
        clock.now, feed.waited_s = 5.0, 1.1
        report(progress(8, 1.25))
    first, second = read_journal(folder.path)
    assert (first.step, second.step) == (4, 8)
    assert first.metrics == {
        "train/loss": 1.5,
        "train/top1": 20.0,
        "train/lr": 0.1,
        "train/epoch": 1.0,
        "speed/images_per_s": 2 * 16 / 4,
        "speed/waiting_percent": 25.0,
    }
    assert second.metrics["speed/images_per_s"] == 4 * 16 / 1
    assert second.metrics["speed/waiting_percent"] == pytest.approx(10)
    output = capsys.readouterr().out
    for part in ("8/8", "loss 1.250", "top-1 20.0 %", "64 images/s", "data 10 %"):
        assert part in output


def test_the_shown_speed_is_that_of_training_alone_since_it_was_last_shown(
    clock: Clock, folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    feed = waiting_feed()
    monitoring = Monitoring(
        Asked(clock, cost_s=25),
        every_steps=50,
        most_share=1,
        folder=folder,
        device=torch.device("cpu"),
    )
    with reporting_of(
        task_of(epochs=100), feed, folder=folder, paused_s=lambda: monitoring.spent_s
    ) as report:
        # The first step compiles the network.
        clock.now = 40.0
        report(progress(10, 2.0))
        # Then ten steps take 2 s, a tenth of which is waiting, and step 50 runs the monitors.
        for step in range(20, 401, 10):
            clock.now += 2
            feed.waited_s += 0.2
            report(progress(step, 2.0))
            monitoring.after_step(step)
    first, second, *others, last = capsys.readouterr().out.splitlines()
    assert "10/400" in first
    # Known only too high from a step that compiled
    assert "4 images/s with start-up" in first
    assert "left" not in first
    # Step 60 was done at 75 s: 50 steps since 40 s, of which the monitors took 25.
    assert "60/400" in second
    assert "80 images/s  waiting for data 10 %" in second
    # They count in the time left: 35 s for 50 steps.
    assert f"75 s, {35 / 50 * 340:.0f} s left" in second
    assert all("80 images/s  waiting for data 10 %" in line for line in others)
    assert "400/400" in last
    assert ", 0 s left" in last
    rates = {
        entry.step: entry.metrics["speed/images_per_s"]
        for entry in read_journal(folder.path)
        if "speed/images_per_s" in entry.metrics
    }
    assert (rates[50], rates[60], rates[70]) == (80, pytest.approx(160 / 27), 80)


@pytest.mark.parametrize("fails", [True, False])
def test_what_monitors_took_is_added_up(clock: Clock, folder: RunFolder, fails: bool) -> None:
    def monitors(_step: int) -> dict[str, float]:
        clock.now += 3
        if fails:
            raise DataError("none of the images can be used")
        return {"monitor/a": 1.0}

    monitoring = Monitoring(
        monitors, every_steps=2, most_share=1, folder=folder, device=torch.device("cpu")
    )
    walk(monitoring, clock, steps=9, step_s=5)
    assert monitoring.spent_s == (3 if fails else 4 * 3)


def test_a_loss_that_is_no_number_is_journaled_and_ends_training(
    clock: Clock, folder: RunFolder, stub_task: Task
) -> None:
    with reporting_of(
        stub_task, waiting_feed(), first_step=0, collapse_steps=100, folder=folder
    ) as report:
        clock.now = 1.0
        with pytest.raises(Diverged):
            report(progress(4, math.nan))
    (entry,) = read_journal(folder.path)
    assert math.isnan(entry.metrics["train/loss"])


def test_only_the_process_with_a_folder_tells_but_each_one_stops(
    clock: Clock, stub_task: Task, capsys: pytest.CaptureFixture[str]
) -> None:
    with reporting_of(
        stub_task, waiting_feed(), first_step=0, collapse_steps=2, folder=None
    ) as report:
        report(progress(4, CENTER_PAIRS.chance_loss))
        with pytest.raises(Diverged):
            report(progress(5, math.inf))
    assert capsys.readouterr().out == ""


def test_a_collapse_is_told_once(
    clock: Clock, folder: RunFolder, stub_task: Task, capsys: pytest.CaptureFixture[str]
) -> None:
    with reporting_of(
        stub_task, waiting_feed(), first_step=0, collapse_steps=4, folder=folder
    ) as report:
        for step in range(1, 8):
            clock.now += 1
            report(progress(step, CENTER_PAIRS.chance_loss))
    alarms = re.findall(r"^alarm .*\b2\.079\b.*\b4 steps", capsys.readouterr().out, re.MULTILINE)
    assert len(alarms) == 1
