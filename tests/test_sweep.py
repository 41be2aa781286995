"""python -m relloc.sweep: what is told of a sweep, whoever answers."""

import re
from pathlib import Path

import pytest

from relloc.sweep import main
from relloc.sweeps.points import Point, note_job
from relloc.sweeps.sweep import Sweep
from relloc.tracking import write_status
from relloc.tracking.process_identity import process_identity

GONE = 999_999_999  # of no process


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    """Three points: one is done, one has a job of a cluster, and of one nothing is noted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RELLOC_RUNS", raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    names = ("done", "sent", "new")
    points = [
        Point(
            kind="train",
            name=f"[red]{name}\x1b[0m",
            overrides=("seed=0",),
            identity=name,
            folder=tmp_path / name,
        )
        for name in names
    ]
    for name in names[:2]:
        (tmp_path / name).mkdir()
    write_status(points[0].folder, "FINISHED")
    note_job(points[0], process_identity(GONE))
    note_job(points[1], {"slurm": "7_2"})
    made = Sweep(tmp_path / "runs/sweeps/s")
    with made.locked():
        made.add(points, ["train"])
    return made


def test_without_a_cluster_the_table_is_shown_and_what_is_unknown(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")  # no squeue
    for word in ("s", "sweep=s", "runs/sweeps/s"):
        assert main(["status", word]) == 1
        output = capsys.readouterr()
        assert "1 done, 1 missing, 1 unknown" in output.out
        assert ("slurm 7_2" in output.out, f"pid {GONE} on " in output.out) == (True, True)
        assert r"[red]done\x1b[0m" in output.out  # as it is, without what a terminal would obey
        assert len(re.findall(r"\b1 points?\b.*unknown", output.out)) == 1
        assert "next: python -m relloc.report sweep=s" in output.out
        assert output.err == ""
    (sweep.folder.parents[2] / "new").mkdir()
    write_status(sweep.points()[2].folder, "FINISHED")
    assert main(["status", "s"]) == 75  # it may succeed another time


def test_a_failed_point_shows_why(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = sweep.points()[1]
    write_status(failed.folder, "FAILED")
    note_job(failed, process_identity(GONE))
    log = sweep.log(failed)
    log.parent.mkdir()
    log.write_text(
        "start\nrelloc: data.root=x holds nothing\n"
        + "".join(f"then {line}\n" for line in range(20))
    )
    assert main(["status", "s"]) == 1
    output = capsys.readouterr().out
    assert output.count("relloc: data.root=x holds nothing") == 1
    assert ("then 19" in output, "then 3\n" in output) == (True, False)
    assert f"again, alone: {failed.again}" in output


def test_a_name_that_no_sweep_has_is_one_message(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    for does in ("status", "wait", "cancel"):
        assert main([does, "other"]) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert re.fullmatch(r"relloc: other .*\bruns/sweeps: .*\bs\n", output.err)
