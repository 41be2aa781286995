"""Which run has a folder, among processes: this test's own locks would not stop it."""

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from relloc.errors import UsageError
from relloc.status import Status
from relloc.tracking import run_lock, write_status
from relloc.tracking.process_identity import process_identity
from relloc.tracking.run_lock import LOCK_FILE, FolderIsTaken, is_held, locked_run_folder

HOLD = """
import os, sys, time
from pathlib import Path
from relloc.tracking.run_lock import locked_run_folder
with locked_run_folder(Path(sys.argv[1])):
    if "fork" in sys.argv and os.fork() == 0:
        time.sleep(600)
    print(os.getpid(), flush=True)
    sys.stdin.readline()
"""
TRY = """
import sys
from pathlib import Path
from relloc.errors import UsageError
from relloc.tracking.run_lock import locked_run_folder
try:
    with locked_run_folder(Path(sys.argv[1])):
        print("ours")
except UsageError as error:
    print(error)
    sys.exit(error.exit_code)
"""
Holder = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def holder() -> Iterator[Holder]:
    """Start a process that holds a folder until it reads a line; it has it when this returns."""
    started = []

    def start(folder: Path, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, str(folder), *words]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert int(process.stdout.readline()) == process.pid
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def attempt(folder: Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", TRY, str(folder)], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout


def test_a_second_process_is_refused_and_told_who_has_it(tmp_path: Path, holder: Holder) -> None:
    process = holder(tmp_path / "run")
    assert is_held(tmp_path / "run")
    code, text = attempt(tmp_path / "run")
    assert code == 2
    assert f"process {process.pid} on {process_identity(1)['host']}" in text
    assert "hydra.run.dir" in text
    assert attempt(tmp_path / "another") == (0, "ours\n")
    process.communicate("\n")
    assert not is_held(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
    assert attempt(tmp_path / "run") == (0, "ours\n")


def test_a_killed_one_has_it_no_longer_although_its_forked_processes_live(
    tmp_path: Path, holder: Holder
) -> None:
    process = holder(tmp_path, "fork")
    process.kill()
    process.wait()
    assert (tmp_path / LOCK_FILE).exists()
    assert not is_held(tmp_path)
    assert attempt(tmp_path) == (0, "ours\n")


def test_one_process_does_not_take_a_folder_twice_and_keeps_it_when_it_asks(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with locked_run_folder(tmp_path):
        assert is_held(tmp_path)
        for same in (tmp_path, tmp_path / "link"):
            with pytest.raises(FolderIsTaken, match=str(os.getpid())), locked_run_folder(same):
                pass
        assert attempt(tmp_path)[0] == 2
    with locked_run_folder(tmp_path):
        pass


def test_of_many_that_start_at_once_one_at_a_time_has_it(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        found = pool.map(_count, [tmp_path] * 8, chunksize=1)
    assert sum(found) == int((tmp_path / "count").read_text())


def _count(folder: Path) -> int:
    """How often this process had the folder, in which it counts up what all read and write."""
    had = 0
    for _ in range(20):
        try:
            with locked_run_folder(folder / "run"):
                count = folder / "count"
                before = int(count.read_text()) if count.exists() else 0
                time.sleep(0.001)
                count.write_text(str(before + 1))
                had += 1
        except UsageError:
            pass
    return had


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def without_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(run_lock, "_SETTLE_S", 0.0)


def write_note(folder: Path, *, age_s: float = 0, **changes: object) -> None:
    note = process_identity(os.getppid()) | {"since": "2026-11-28 10:00:00"} | changes
    (folder / LOCK_FILE).write_text(json.dumps(note))
    then = time.time() - age_s
    os.utime(folder / LOCK_FILE, (then, then))


@pytest.mark.usefixtures("without_locks")
def test_without_locks_a_living_process_of_this_machine_has_it(tmp_path: Path) -> None:
    write_note(tmp_path, age_s=1e6)
    assert is_held(tmp_path)
    with pytest.raises(FolderIsTaken, match=str(os.getppid())), locked_run_folder(tmp_path):
        pass
    write_note(tmp_path, born="another process of that number")
    assert not is_held(tmp_path)
    with locked_run_folder(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK_FILE).exists()


@pytest.mark.usefixtures("without_locks")
def test_without_locks_another_machine_has_it_as_long_as_it_touches_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_note(tmp_path, host="elsewhere", age_s=run_lock.SILENT_S / 2)
    assert is_held(tmp_path)
    with pytest.raises(FolderIsTaken, match="elsewhere"), locked_run_folder(tmp_path):
        pass
    write_note(tmp_path, host="elsewhere", age_s=run_lock.SILENT_S + 60)
    assert not is_held(tmp_path)
    monkeypatch.setattr(run_lock, "BEAT_S", 0.01)
    with locked_run_folder(tmp_path):
        os.utime(tmp_path / LOCK_FILE, (0, 0))
        end = time.monotonic() + 60
        while (tmp_path / LOCK_FILE).stat().st_mtime == 0:
            assert time.monotonic() < end, "the file was not touched"
            time.sleep(0.01)


@pytest.mark.usefixtures("without_locks")
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"pid": "x"}'])
def test_without_locks_a_note_that_says_nothing_keeps_nobody_out(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / LOCK_FILE).write_bytes(content)
    assert not is_held(tmp_path)
    with locked_run_folder(tmp_path):
        pass


def test_where_locks_stay_on_one_machine_the_note_of_another_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_note(tmp_path, host="elsewhere")
    with locked_run_folder(
        tmp_path
    ):  # a network folder whose locks all machines see: the one before was killed
        pass
    monkeypatch.setattr(run_lock, "locks_stay_here", lambda _path: True)
    monkeypatch.setattr(run_lock, "_SETTLE_S", 0.0)
    write_note(tmp_path, host="elsewhere")
    assert is_held(tmp_path)
    with pytest.raises(FolderIsTaken, match="elsewhere"), locked_run_folder(tmp_path):
        pass
    write_note(tmp_path)  # of this machine, where the lock has answered
    with locked_run_folder(tmp_path):
        pass


def test_a_sweep_sees_a_point_that_a_command_of_its_own_has(tmp_path: Path, holder: Holder) -> None:
    from relloc.sweeps.point_status import point_statuses
    from relloc.sweeps.points import Point

    point = Point(kind="train", name="a", overrides=(), identity="a", folder=tmp_path / "run")
    process = holder(point.folder)
    write_status(point.folder, "RUNNING")
    assert point_statuses([point], {})[0].status is Status.RUNNING
    process.communicate("\n")
    assert point_statuses([point], {})[0].status is Status.STOPPED
