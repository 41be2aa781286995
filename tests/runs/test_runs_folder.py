"""Tests a run folder from its opening to its end, however the run ends."""

from pathlib import Path

import pytest

from relloc.errors import Interrupted, UsageError
from relloc.pretext.stopping import Stopped
from relloc.runs.folder import UNREADABLE_FILE, check_files, lock_folder, open_folder
from relloc.runs.invocation import Invocation
from relloc.status import Status
from relloc.tracking import RunRecord, read_status
from relloc.tracking.journal import JOURNAL_FILE
from relloc.tracking.record import RUN_FILE
from relloc.tracking.run_lock import FolderIsTaken

RECORD = RunRecord(name="a run", experiment="relloc")


def invocation(folder: Path, *, names_folder: bool = False) -> Invocation:
    return Invocation(
        command="train",
        folder=folder,
        names_folder=names_folder,
        words=(),
        choices={},
        settings={"tracking": {"uri": None}},
        files={"config.yaml": "seed: 0\n", ".hydra/config.yaml": "seed: 0\n"},
    )


def status(path: Path) -> Status | None:
    found = read_status(path)
    return found.status if found else None


def test_a_folder_is_one_commands_alone(tmp_path: Path) -> None:
    with lock_folder(tmp_path) as run_dir:
        assert run_dir == tmp_path
        with pytest.raises(FolderIsTaken), lock_folder(tmp_path):
            pass
    with lock_folder(tmp_path):
        pass


def test_a_finished_run_has_its_record_config_and_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_folder(invocation(tmp_path), RECORD, tmp_path) as folder:
        assert status(tmp_path) is Status.RUNNING
        folder.summarize()
    assert status(tmp_path) is Status.DONE
    assert RunRecord.read(tmp_path).name == "a run"
    assert (
        (tmp_path / "config.yaml").read_text()
        == (tmp_path / ".hydra/config.yaml").read_text()
        == "seed: 0\n"
    )
    assert "to resume" not in capsys.readouterr().out
    check_files(tmp_path)


@pytest.mark.parametrize(
    ("names_folder", "words"),
    [(True, "command to resume"), (False, "command with hydra.run.dir=")],
)
def test_a_stopped_run_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], names_folder: bool, words: str
) -> None:
    with (
        pytest.raises(Stopped),
        open_folder(invocation(tmp_path, names_folder=names_folder), RECORD, tmp_path),
    ):
        (tmp_path / "results.jsonl").touch()
        raise Stopped(143)
    assert status(tmp_path) is Status.STOPPED
    assert f"repeat the {words}" in capsys.readouterr().out.replace("\n", " ")


def test_a_stopped_run_without_anything_saved_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyboardInterrupt), open_folder(invocation(tmp_path), RECORD, tmp_path):
        raise KeyboardInterrupt
    output = capsys.readouterr().out.replace("\n", " ")
    assert "interrupted" in output
    assert "nothing had been saved" in output
    assert f"repeat the command with hydra.run.dir={tmp_path} " in output


def test_a_folder_of_something_else_is_refused_and_stays(tmp_path: Path) -> None:
    (tmp_path / "out.log").touch()
    with lock_folder(tmp_path):  # of the command's own output
        pass
    (tmp_path / "a.jpg").touch()
    with (
        pytest.raises(UsageError, match=r"hydra\.run\.dir=.* a\.jpg"),
        lock_folder(tmp_path),
    ):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jpg", "out.log"]
    RECORD.write(tmp_path)
    with lock_folder(tmp_path):
        pass


def test_a_mistake_before_any_work_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError), open_folder(invocation(tmp_path), RECORD, tmp_path):
        raise UsageError("a wrong setting")
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_after_some_work_is_a_failed_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError), open_folder(invocation(tmp_path), RECORD, tmp_path):
        (tmp_path / JOURNAL_FILE).write_text("")
        raise UsageError("the same command would end so again")
    assert status(tmp_path) is Status.FAILED
    assert "to resume" not in capsys.readouterr().out


def test_what_ended_outside_may_be_tried_again(tmp_path: Path) -> None:
    with pytest.raises(Interrupted), open_folder(invocation(tmp_path), RECORD, tmp_path):
        raise Interrupted("a disk went away")
    assert status(tmp_path) is Status.FAILED
    assert (tmp_path / RUN_FILE).is_file()


def test_unreadable_images_of_all_parts_of_a_run_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("b.jpg", "a.jpg", "b.jpg"):
        with open_folder(invocation(tmp_path), RECORD, tmp_path) as folder:
            folder.unreadable[name] = "is an empty file"
            folder.summarize()
    assert (
        tmp_path / UNREADABLE_FILE
    ).read_text() == "a.jpg: is an empty file\nb.jpg: is an empty file\n"
    # The second and the third run know of both images.
    lines = capsys.readouterr().out.splitlines()
    counts = [line for line in lines if line.startswith("2 images")]
    assert counts
    assert all("a.jpg" in line for line in counts)
