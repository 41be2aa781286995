"""How points stand, by what their folders say and who has their jobs; and what is put right."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from relloc.errors import UsageError
from relloc.status import Status
from relloc.sweeps.point_status import (
    PointStatus,
    point_statuses,
    point_statuses_and_problems,
    point_statuses_when_answered,
    repair_status,
    status_of,
)
from relloc.sweeps.points import Point, folder_of, name_of, note_ending, note_job
from relloc.sweeps.sweep import Sweep, code_and_configs
from relloc.tracking import Journal, RunRecord, search, sync, write_status
from relloc.tracking.process_identity import is_alive, process_identity


def point(
    tmp_path: Path, status: str | None = None, job: Mapping[str, object] | None = None
) -> Point:
    made = Point(
        kind="train",
        name="gap_px=4",
        overrides=("grid.gap_px=4",),
        identity="abc",
        folder=tmp_path / "run",
    )
    made.folder.mkdir(exist_ok=True)
    if status:
        write_status(made.folder, status)
    if job:
        note_job(made, job)
    return made


def asked(**states: Status) -> dict:
    def ask(numbers: Sequence[str]) -> dict[str, Status]:
        return {
            number: state
            for name, state in states.items()
            if (number := name.removeprefix("job")) in numbers
        }

    return {"slurm": ask}


@pytest.mark.parametrize(
    ("status", "queue", "state"),
    [
        ("FINISHED", {}, Status.DONE),
        ("FAILED", {}, Status.FAILED),
        ("KILLED", {}, Status.STOPPED),
        ("RUNNING", {}, Status.STOPPED),  # ended without writing its status
        (None, {}, Status.FAILED),  # its job left no word
        (None, {"job7": Status.CANCELLED}, Status.CANCELLED),  # by hand, before it began
        ("KILLED", {"job7": Status.CANCELLED}, Status.CANCELLED),
        ("RUNNING", {"job7": Status.CANCELLED}, Status.CANCELLED),
        ("FINISHED", {"job7": Status.CANCELLED}, Status.DONE),
        ("FAILED", {"job7": Status.CANCELLED}, Status.FAILED),
        ("FAILED", {"job7": Status.WAITING}, Status.WAITING),  # it is to be run again
        ("RUNNING", {"job7": Status.RUNNING}, Status.RUNNING),
        ("RUNNING", {"job8": Status.RUNNING}, Status.STOPPED),  # another's
    ],
)
def test_a_point_stands_as_its_job_and_its_folder_say(
    tmp_path: Path, status: str | None, queue: dict[str, Status], state: str
) -> None:
    (found,) = point_statuses([point(tmp_path, status, {"slurm": "7"})], asked(**queue))
    assert found.status == state
    assert found.in_flight == (state in (Status.RUNNING, Status.WAITING))


@pytest.mark.parametrize(
    ("status", "asked_to_end", "state"),
    [
        (None, Status.CANCELLED, Status.CANCELLED),  # before it began
        ("KILLED", Status.CANCELLED, Status.CANCELLED),
        ("RUNNING", Status.CANCELLED, Status.CANCELLED),
        ("FINISHED", Status.CANCELLED, Status.DONE),  # it was faster
        (None, Status.STOPPED, Status.STOPPED),
        ("FAILED", Status.STOPPED, Status.FAILED),
    ],
)
def test_a_point_that_was_asked_to_end_has_not_failed(
    tmp_path: Path, status: str | None, asked_to_end: Status, state: str
) -> None:
    made = point(tmp_path, status, {"slurm": "7"})
    note_ending(made.folder, asked_to_end)
    assert [now.status for now in point_statuses([made], asked())] == [state]
    assert [now.status for now in point_statuses([made], asked(job7=Status.RUNNING))] == [
        Status.RUNNING
    ]  # it takes a while


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ("FINISHED", Status.DONE),
        (None, Status.UNKNOWN),
        ("KILLED", Status.UNKNOWN),
        ("RUNNING", Status.RUNNING),
    ],
)
def test_what_only_a_silent_cluster_knows_is_unknown(
    tmp_path: Path, status: str | None, state: str
) -> None:
    def silent(_numbers: Sequence[str]) -> dict[str, Status]:
        raise UsageError("no answer")

    made = point(tmp_path, status, {"slurm": "7"})
    found, told = point_statuses_and_problems([made], {"slurm": silent})
    assert ([now.status for now in found], told) == ([state], ["no answer"])
    assert repair_status(found) == []  # it may run
    with pytest.raises(UsageError, match="no answer"):
        point_statuses([made], {"slurm": silent})
    for path in (made.folder, *made.folder.iterdir()):
        os.utime(path, (0, 0))
    (found,), _ = point_statuses_and_problems([made], {"slurm": silent})
    assert found.status == (
        Status.DONE if status == "FINISHED" else Status.UNKNOWN
    )  # nothing was heard of it lately


def test_a_damaged_note_hides_no_other_point(tmp_path: Path) -> None:
    made = point(tmp_path, "RUNNING", {"slurm": "7"})
    (made.folder / "point.json").write_text("{")
    os.utime(made.folder / "status.json", (0, 0))
    os.utime(made.folder / "point.json", (0, 0))
    os.utime(made.folder, (0, 0))
    (found,), told = point_statuses_and_problems([made], {})
    assert (found.status, len(told), "point.json" in told[0]) == (Status.UNKNOWN, 1, True)


def test_a_run_of_another_machine_runs_while_it_writes(tmp_path: Path) -> None:
    there = point(tmp_path, "RUNNING", process_identity(os.getpid()) | {"host": "elsewhere"})
    found = point_statuses([there], {})
    assert found[0].status == Status.RUNNING
    assert repair_status(found) == []
    for path in (there.folder, *there.folder.iterdir()):
        os.utime(path, (0, 0))
    assert point_statuses([there], {})[0].status == Status.STOPPED


@pytest.mark.parametrize("damaged", ["status.json", "journal.jsonl"])
def test_a_damaged_file_hides_no_other_point(tmp_path: Path, damaged: str) -> None:
    made = point(tmp_path, "KILLED")
    (made.folder / damaged).write_text('{"st\n{"\n')
    found = point_statuses([made], {})
    assert found[0].status == (Status.FAILED if damaged == "status.json" else Status.STOPPED)
    assert repair_status(found) == []


def test_a_damaged_note_of_a_job_is_told(tmp_path: Path) -> None:
    made = point(tmp_path, "RUNNING", {"slurm": "7"})
    (made.folder / "point.json").write_text("{")
    with pytest.raises(UsageError, match=r"point\.json"):
        point_statuses([made], {})


def test_a_scheduler_that_is_silent_for_a_while_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = iter([UsageError("no answer"), UsageError("no answer"), {"7": Status.RUNNING}])

    def ask(numbers: Sequence[str]) -> dict[str, Status]:
        if isinstance(answer := next(answers), UsageError):
            raise answer
        return answer  # pyright: ignore[reportReturnType]

    monkeypatch.setattr("relloc.sweeps.point_status._AGAIN_S", 0.0)
    (found,) = point_statuses_when_answered(
        [point(tmp_path, "RUNNING", {"slurm": "7"})], {"slurm": ask}
    )
    assert found.status == Status.RUNNING
    assert capsys.readouterr().err.count("no answer") == 1


def test_a_point_that_nobody_began_is_missing(tmp_path: Path) -> None:
    assert point_statuses([point(tmp_path)], {}) == [
        PointStatus(point=point(tmp_path), status=Status.MISSING)
    ]


def test_progress_and_time_left_are_those_of_the_last_reports(tmp_path: Path) -> None:
    running = point(tmp_path, "RUNNING", process_identity(os.getpid()))
    RunRecord(name="a", experiment="e", params={"schedule.epochs": 8}).write(running.folder)
    journal = Journal(running.folder)
    for step, epoch in ((10, 1.0), (20, 2.0)):
        journal.log({"train/epoch": epoch}, step)
    lines = (running.folder / "journal.jsonl").read_text().splitlines()
    first = int(lines[0].partition('"time_ms": ')[2].partition(",")[0])
    told = lines[1].partition('"time_ms": ')[2].partition(",")[0]
    (running.folder / "journal.jsonl").write_text(
        lines[0] + "\n" + lines[1].replace(told, str(first + 3000)) + "\n"
    )
    (found,) = point_statuses([running], {})
    assert (found.status, found.progress, found.left_s) == (Status.RUNNING, 0.25, 18.0)
    waiting = dataclasses.replace(running, folder=tmp_path / "waiting")
    shutil.copytree(running.folder, waiting.folder)
    write_status(waiting.folder, "KILLED")
    note_job(waiting, {"slurm": "7"})
    (found,) = point_statuses([waiting], asked(job7=Status.WAITING))
    assert (found.status, found.progress, found.left_s) == (Status.WAITING, 0.25, None)


def test_a_process_is_told_from_a_later_one_of_its_number() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    mark = process_identity(child.pid)
    assert is_alive(mark)
    assert not is_alive(mark | {"born": "0"})
    assert not is_alive(mark | {"host": "elsewhere"})
    child.communicate(b"\n")
    assert not is_alive(mark)


@pytest.mark.slow
def test_what_a_cluster_killed_does_not_run_for_ever_in_mlflow(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    killed = point(tmp_path, "RUNNING", {"slurm": "7"})
    RunRecord(name="a", experiment="e", tracking_uri=uri).write(killed.folder)
    sync(killed.folder, uri)
    assert repair_status(point_statuses([killed], asked(job7=Status.RUNNING))) == []
    (message,) = repair_status(point_statuses([killed], asked()))
    assert re.search(r"^gap_px=4 .*\bstopped\b", message)
    assert status_of(killed.folder) == Status.STOPPED
    (run,) = search(uri, "e")
    assert run["status"] == "KILLED"
    assert repair_status(point_statuses([killed], asked())) == []


def test_names_say_what_is_swept_and_folders_stay(tmp_path: Path) -> None:
    overrides = ("model=resnet50", "grid.gap_px=48", "+grid.jitter_px=7", "seed=2")
    assert name_of(overrides, ["grid.gap_px", "grid.jitter_px"], 2) == "gap_px=48 jitter_px=7"
    assert name_of(overrides, [], 2) == "seed=2"
    assert folder_of(tmp_path, "train", "a='x/y' b=[1,2]", "abc").name == "train_a_x_y_b_1_2_abc"
    (tmp_path / "train_other_name_abc").mkdir()
    assert folder_of(tmp_path, "train", "seed=2", "abc").name == "train_other_name_abc"


def test_a_copy_of_the_code_is_shared_until_something_changes(tmp_path: Path) -> None:
    for name in ("relloc", "conf", "plugins"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)

    sweep = Sweep(tmp_path / "sweep")

    def copied() -> Path:
        folders = {
            "package": tmp_path / "relloc",
            "conf": tmp_path / "conf",
            "plugins": tmp_path / "plugins",
        }
        return sweep.copy(code_and_configs(**folders, own={}))

    first = copied()
    assert (first / "hydra_plugins/plugins/file").read_text() == "plugins"
    assert copied() == first
    (tmp_path / "conf" / "file").write_text("changed")
    second = copied()
    assert second != first
    assert ((first / "conf/file").read_text(), (second / "conf/file").read_text()) == (
        "conf",
        "changed",
    )
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["code"]


def test_a_sweep_has_each_point_once_however_often_it_is_started(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "sweeps" / "a")
    with sweep.locked():
        sweep.add([point(tmp_path)], ["train"])
    with sweep.locked():
        sweep.add([point(tmp_path)], ["train"])
    assert sweep.points() == [point(tmp_path)]


def test_a_cancelled_job_is_noted_before_the_cluster_forgets_it(tmp_path: Path) -> None:
    made = point(tmp_path, None, {"slurm": "7"})
    assert repair_status(point_statuses([made], asked(job7=Status.CANCELLED))) == []
    assert [now.status for now in point_statuses([made], asked())] == [Status.CANCELLED]
