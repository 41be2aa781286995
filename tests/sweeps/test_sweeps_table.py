"""The table of a sweep on the console: one row a point, why points failed, and the next command."""

from pathlib import Path

import pytest
from rich.console import Console

from relloc.status import Status
from relloc.sweeps import table
from relloc.sweeps.point_status import PointStatus
from relloc.sweeps.points import POINT_FILE, Point, note_job
from relloc.sweeps.sweep import Sweep


def point(folder: Path, name: str = "gap_px=4", **more: object) -> Point:
    (folder / name).mkdir(parents=True, exist_ok=True)
    fields = {
        "kind": "train",
        "overrides": ("seed=0",),
        "identity": "abc",
        "folder": folder / name,
        "name": name,
    }
    return Point(**{**fields, **more})  # type: ignore[arg-type]


def point_status(status: Status, of: Point, **more: float) -> PointStatus:
    return PointStatus(point=of, status=status, **more)


def cells(*found: PointStatus) -> dict[str, list[str]]:
    """The columns of the table, by their heads."""
    made = table.table(found)
    return {str(column.header): [str(cell) for cell in column.cells] for column in made.columns}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (99, "99 s"),
        (100, "2 min"),
        (5999, "100 min"),
        (6000, "1.7 h"),
        (360_000, "100.0 h"),
    ],
)
def test_the_time_left_of_a_running_point_has_the_unit_that_is_short(
    tmp_path: Path, seconds: float, text: str
) -> None:
    told = cells(point_status(Status.RUNNING, point(tmp_path), progress=0.256, left_s=seconds))
    assert (told["progress"], told["time left"]) == (["26 %"], [text])


def test_a_point_that_does_not_run_has_no_time_left_and_may_have_no_progress(
    tmp_path: Path,
) -> None:
    stopped = point_status(Status.STOPPED, point(tmp_path, "a"), progress=0.5, left_s=60.0)
    told = cells(stopped, point_status(Status.MISSING, point(tmp_path, "b")))
    assert (told["progress"], told["time left"]) == (["50 %", ""], ["", ""])


def test_the_title_counts_each_state_that_a_point_is_in(tmp_path: Path) -> None:
    states = (Status.FAILED, Status.DONE, Status.DONE, Status.UNKNOWN)
    made = table.table(
        [point_status(state, point(tmp_path, f"p{number}")) for number, state in enumerate(states)]
    )
    assert made.title == "2 done, 1 failed, 1 unknown"


def test_the_job_is_a_process_of_a_machine_or_a_number_of_a_cluster_and_folders_are_relative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    points = [point(tmp_path, name) for name in ("process", "cluster", "none", "damaged")]
    note_job(points[0], {"pid": 12, "host": "node1", "born": 0})
    note_job(points[1], {"slurm": "7_2"})
    (points[3].folder / POINT_FILE).write_text("{")
    told = cells(*(point_status(Status.MISSING, made) for made in points))
    assert told["job"] == ["pid 12 on node1", "slurm 7_2", "", "?"]
    assert told["folder"] == ["process", "cluster", "none", "damaged"]


def test_names_of_points_mean_nothing_to_the_console(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    made = table.table([point_status(Status.DONE, point(tmp_path, "[red]a\x1b[0m:smile:"))])
    table.print_message(made)
    output = capsys.readouterr().out
    assert r"[red]a\x1b[0m:smile:" in output
    assert "\x1b" not in output


@pytest.mark.parametrize("columns", [None, "60"])
def test_a_file_has_room_for_the_table_unless_a_width_is_asked_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    columns: str | None,
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    table.print_message(table.table([point_status(Status.DONE, point(tmp_path, "a" * 120))]))
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= (int(columns) if columns else 160)
    assert output.count("a") >= 120  # folded, not cut


def told_of_failed(
    folder: Path, log: str | None, capsys: pytest.CaptureFixture[str], **more: object
) -> str:
    path = folder / "log"
    if log is not None:
        path.write_text(log)
    failed = point_status(Status.FAILED, point(folder, "a", **more))
    done = point_status(Status.DONE, point(folder, "b", **more))
    table.print_failed_points([failed, done], lambda _: path if log is not None else None)
    return capsys.readouterr().out


def test_of_a_failed_point_the_end_of_its_log_its_message_and_its_command_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = "relloc: no data\n" + "".join(f"line {number}\n\n" for number in range(20))
    output = told_of_failed(tmp_path, log + "bar 1 %\rbar 100 %\n", capsys)
    lines = [line.strip() for line in output.splitlines()]
    assert "relloc: no data" in lines
    assert [line for line in lines if line.startswith("line")] == [
        f"line {number}" for number in range(13, 20)
    ]
    assert "bar 100 %" in lines  # a bar writes over its own line
    assert f"again, alone: {point(tmp_path, 'a').again}" in lines
    assert sum(line.startswith("failed") for line in lines) == 1  # the other is done


def test_a_message_among_the_last_lines_is_shown_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        told_of_failed(tmp_path, "one\nrelloc: no data\ntwo\n", capsys).count("relloc: no data")
        == 1
    )


@pytest.mark.parametrize("log", [None, "", "\n\n"])
def test_a_point_without_output_is_said_to_have_none(
    tmp_path: Path, log: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    told = told_of_failed(tmp_path, log, capsys)
    assert "no output" in told
    assert "again, alone:" in told


def test_a_point_that_was_sent_to_a_cluster_is_sent_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = told_of_failed(
        tmp_path, "x", capsys, resend=("-m", "relloc.train", "launcher=slurm"), cwd="/elsewhere"
    )
    assert "again, alone: cd /elsewhere && python -m relloc.train launcher=slurm" in output


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("start\nrelloc: first\nrelloc: no data\nmore\n", "no data"),
        ("Traceback\nValueError: x\n\n", "ValueError: x"),
        ("relloc: " + "x" * 100_000 + "\nend\n", "end"),  # only the end of a long log is read
    ],
)
def test_the_reason_is_the_last_message_or_else_the_last_line(
    tmp_path: Path, log: str, reason: str
) -> None:
    (tmp_path / "log").write_text(log)
    assert table.reason_of(tmp_path / "log") == reason


def test_the_reason_of_a_point_without_a_log_is_that_it_has_none(tmp_path: Path) -> None:
    assert table.reason_of(None) == table.reason_of(tmp_path / "nowhere")
    assert "no output" in table.reason_of(None)


def test_who_does_not_answer_is_told_once_with_the_number_of_points_that_nobody_knows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unknown = [
        point_status(status, point(tmp_path))
        for status in (Status.UNKNOWN, Status.DONE, Status.UNKNOWN)
    ]
    table.print_silent_schedulers(unknown, ["squeue \x1b[2J is silent", "squeue \x1b[2J is silent"])
    output = capsys.readouterr().out
    assert output.count("is silent") == 1
    assert "2 points" in output
    assert "\x1b" not in output
    table.print_silent_schedulers(unknown, [])
    assert capsys.readouterr().out == ""


def test_the_next_commands_name_the_sweep_as_a_shell_takes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table.print_next(Sweep(tmp_path / "a sweep's"))
    output = capsys.readouterr().out
    for command in ("relloc.report sweep=", "relloc.sweep status "):
        (line,) = (line for line in output.splitlines() if command in line)
        assert "'\"'\"'" in line


def test_colors_are_for_terminals_alone(tmp_path: Path) -> None:
    made = table.table([point_status(Status.FAILED, point(tmp_path))])
    terminal = Console(force_terminal=True, width=160, color_system="standard", no_color=False)
    with terminal.capture() as seen:
        terminal.print(made)
    assert "\x1b[31mfailed" in seen.get()
