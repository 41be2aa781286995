"""Files are written whole, appended to in whole lines, and locked."""

import os
import subprocess
import sys
import threading
from multiprocessing import get_context
from pathlib import Path

import pytest

from relloc import files


def _append_many(path: Path, name: str) -> None:
    for number in range(50):
        files.append_lines(path, [f"{name} {number} first", f"{name} {number} second"])


def test_four_writers_lose_no_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    context = get_context("spawn")
    writers = [context.Process(target=_append_many, args=(path, name)) for name in "abcd"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    lines = path.read_text().splitlines()
    assert len(lines) == len(set(lines)) == 400
    assert [line.replace("first", "second") for line in lines[::2]] == lines[1::2]


@pytest.mark.parametrize("kept", ["", "one\n", "one\ntwo\n", "x" * 200_000 + "\n"])
@pytest.mark.parametrize("half", ["", '{"unfinis', "y" * 200_000])
def test_a_half_line_is_no_line_and_makes_room_for_the_next(
    tmp_path: Path, kept: str, half: str
) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(kept + half)
    assert files.read_lines(path) == kept.encode().splitlines()
    files.append_lines(path, ["next"])
    assert path.read_text() == kept + "next\n"


def test_where_the_disk_is_full_nothing_is_appended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    files.append_lines(path, ["before"])

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            files.append_lines(path, ["lost"])
    assert path.read_text() == "before\n"


def test_no_file_has_no_lines(tmp_path: Path) -> None:
    assert files.read_lines(tmp_path / "none") == []


def test_a_whole_file_takes_the_place_of_the_old_one_or_leaves_it(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    files.write_whole(path, b"old")
    files.write_json(path, {"new": "é"})
    assert path.read_text(encoding="utf-8") == '{\n "new": "é"\n}'
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(path, float("nan"))
    assert path.read_text(encoding="utf-8") == '{\n "new": "é"\n}'
    assert os.listdir(path.parent) == ["file"]


def test_what_a_killed_process_began_to_write_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".file.123.unfinished").touch()
    (tmp_path / ".other.123.unfinished").touch()
    files.remove_unfinished(tmp_path / "file")
    assert os.listdir(tmp_path) == [".other.123.unfinished"]


def test_what_killed_processes_began_to_write_is_removed_but_for_a_file_of_others(
    tmp_path: Path,
) -> None:
    for name in (
        ".backbone.safetensors.123.unfinished",
        ".mlflow.json.123.unfinished",
        "mine.unfinished",
    ):
        (tmp_path / name).touch()
    files.remove_all_unfinished(tmp_path, but="mlflow.json")
    assert sorted(os.listdir(tmp_path)) == [".mlflow.json.123.unfinished", "mine.unfinished"]
    files.remove_all_unfinished(tmp_path / "none", but="mlflow.json")


@pytest.mark.parametrize("asked", [KeyboardInterrupt, SystemExit])
def test_a_signal_while_a_file_is_written_leaves_the_old_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: type[BaseException]
) -> None:
    path = tmp_path / "file"
    files.write_whole(path, b"old")

    def stop(_descriptor: int) -> None:
        raise asked

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", stop)
        with pytest.raises(asked):
            files.write_whole(path, b"new")
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_bytes() == b"old"


def test_one_at_a_time_holds_a_lock(tmp_path: Path) -> None:
    order = []
    inside = threading.Event()

    def second() -> None:
        inside.wait()
        with files.locked(tmp_path / "lock"):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with files.locked(tmp_path / "lock"):
        inside.set()
        thread.join(timeout=0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


FULL = """
import os, sys
from pathlib import Path
from relloc.files import append_lines, read_lines

folder, limit = Path(sys.argv[1]), int(sys.argv[2])
path, line = folder / "lines", "x" * 300
if limit:
    import resource, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
else:
    (folder / "other").write_bytes(bytes(40_000))
written = 0
for number in range(1000):
    try:
        append_lines(path, [f"{number}a{line}", f"{number}b{line}"], durable=number % 2 == 0)
    except OSError as error:
        assert error.filename == str(path), error
        break
    written += 2
assert 0 < written < 2000
assert len(read_lines(path)) == written
assert path.read_bytes().endswith(b"x\\n")
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
else:
    (folder / "other").unlink()
append_lines(path, [f"last{line}"])
lines = read_lines(path)
assert len(lines) == written + 1
assert all(one.endswith(line.encode()) and len(one) < len(line) + 6 for one in lines)
"""


def test_a_file_that_may_not_grow_keeps_whole_lines(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL, str(tmp_path), "10000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_disk_that_is_really_full_keeps_whole_lines(tmp_path: Path) -> None:
    """Unlike a limit it takes a part of a line; cutting that off makes room for the next line."""
    mounted = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        'mount -t tmpfs -o size=64k tmpfs "$1" && shift && exec "$@"',
        "sh",
    ]
    try:
        subprocess.run([*mounted, str(tmp_path), "true"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may mount no file system")
    command = [*mounted, str(tmp_path), sys.executable, "-c", FULL, str(tmp_path), "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail() -> None:
        with files.writing(tmp_path / "a") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []
    with files.writing(tmp_path / "a") as file:
        file.write(b"old")
    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]
