"""What is noted of a point's process, and what of its output is kept."""

import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hydra_plugins.relloc_launchers.processes import ProcessLauncher
from omegaconf import OmegaConf

from relloc.errors import Interrupted
from relloc.status import Status
from relloc.sweeps.point_status import point_statuses
from relloc.sweeps.points import Point, note_job
from relloc.sweeps.sweep import Sweep
from relloc.sweeps.table import reason_of


def run(tmp_path: Path, code: str, *, processes: int) -> tuple[ProcessLauncher, Point]:
    """A launcher that has run one point, which is that code."""

    class Runs(ProcessLauncher):
        def command(self, point: Point) -> list[str]:
            return [sys.executable, "-c", code]

    launcher = Runs(OmegaConf.create({"processes": processes}))
    launcher.sweep, launcher.code = Sweep(tmp_path / "sweep"), tmp_path
    made = Point(kind="train", name="a", overrides=(), identity="a", folder=tmp_path / "runs" / "a")
    launcher.plan([made])
    launcher.follow([made])
    return launcher, made


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_what_a_signal_ends_before_it_began_was_stopped(
    tmp_path: Path, number: signal.Signals
) -> None:
    code = (
        f"import os, signal; signal.signal({number:d}, signal.SIG_DFL); "
        f"os.kill(os.getpid(), {number:d})"
    )
    _, made = run(tmp_path, code, processes=1)
    assert [now.status for now in point_statuses([made], {})] == [Status.STOPPED]


# It looks again and again: signal.pause() misses a signal that comes just before it.
WAITS = """
import pathlib, signal, sys, time
asked = []
signal.signal(signal.SIGHUP, lambda *_: asked.append(129))
pathlib.Path("begun").touch()
while not asked:
    time.sleep(0.01)
sys.exit(asked[0])
"""


def test_a_closed_terminal_reaches_the_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have no terminal of their own, and would go on while no other point is started."""
    monkeypatch.chdir(tmp_path)

    def hang_up() -> None:
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGHUP)

    asked = threading.Thread(target=hang_up)
    asked.start()
    _, made = run(tmp_path, WAITS, processes=2)
    asked.join()
    assert [now.status for now in point_statuses([made], {})] == [Status.STOPPED]


def test_a_signal_that_comes_while_a_point_is_started_reaches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of the launcher as it is now: Hydra, in other tests, imports plugins again.
    names = ProcessLauncher._start_next.__globals__
    start_noted = names["start_noted"]

    def start_and_hang_up(*words: Any, **named: Any) -> Any:
        process = start_noted(*words, **named)
        os.kill(os.getpid(), signal.SIGHUP)
        return process

    monkeypatch.setitem(names, "start_noted", start_and_hang_up)
    _, made = run(tmp_path, "import time; time.sleep(120)", processes=2)
    assert [now.status for now in point_statuses([made], {})] == [Status.STOPPED]


@pytest.mark.parametrize("processes", [1, 2])
def test_why_a_point_failed_is_kept(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], processes: int
) -> None:
    code = (
        "import sys; print('on its way'); print('relloc: no', 'data', file=sys.stderr); sys.exit(2)"
    )
    launcher, made = run(tmp_path, code, processes=processes)
    assert [now.status for now in point_statuses([made], {})] == [Status.FAILED]
    assert reason_of(launcher.log_of(made)) == "no data"
    output = capfd.readouterr()
    # On the console where it runs alone there
    assert ("on its way" in output.out, "relloc: no data" in output.err) == (
        (processes == 1),
        (processes == 1),
    )


def test_a_point_that_may_have_a_job_elsewhere_is_not_run_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # no squeue
    launcher = ProcessLauncher(OmegaConf.create({"processes": 1}))
    sent = Point(kind="train", name="a", overrides=(), identity="a", folder=tmp_path / "a")
    note_job(sent, {"slurm": "7"})
    with pytest.raises(Interrupted, match="twice"):
        launcher._point_statuses([sent])


@pytest.mark.parametrize(
    ("processes", "gpus", "at_a_time"),
    [("auto", "", 1), ("auto", "0,1", 2), (1, "0,1", 1), (3, "", 3)],
)
def test_a_sweep_says_how_many_points_run_at_a_time_and_which_setting_changes_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    processes: int | str,
    gpus: str,
    at_a_time: int,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)

    class Succeeds(ProcessLauncher):
        def command(self, point: Point) -> list[str]:
            return [sys.executable, "-c", ""]

    launcher = Succeeds(OmegaConf.create({"processes": processes}))
    launcher.sweep, launcher.code = Sweep(tmp_path / "sweep"), tmp_path
    points = []
    for name in "abcd":
        folder = tmp_path / "runs" / name
        points.append(Point(kind="train", name=name, overrides=(), identity=name, folder=folder))
    # A sweeper that searches launches one batch after the other.
    for batch in (points[:2], points[2:]):
        launcher.plan(batch)
        launcher.follow(batch)
    output = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sweep ")]
    assert len(output) == 1
    assert re.findall(r"(\d+) points? at a time", output[0]) == [str(at_a_time)]
    assert "launcher.processes" in output[0]
    assert ("no GPU" in output[0]) == (processes == "auto" and not gpus)
