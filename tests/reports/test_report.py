import subprocess
import sys
from pathlib import Path

import pytest

from relloc.report import main
from relloc.sweeps.points import Point
from relloc.sweeps.sweep import Sweep


@pytest.fixture
def runs(new_run, result, tmp_path: Path) -> Path:
    new_run("a", result("linear_in1k", "feature4", "top1", 9.0))
    return tmp_path / "runs"


def test_it_prints_markdown_of_the_default_folder(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RELLOC_RUNS", str(runs))
    assert main([]) == 0
    first = capsys.readouterr().out
    monkeypatch.delenv("RELLOC_RUNS")
    monkeypatch.chdir(runs.parent)
    assert main([]) == 0
    assert capsys.readouterr().out == first
    assert "| random, seed 0 | — | — | — | 9.00 ≈ [4] | — | — |" in " ".join(first.split())


def test_of_a_sweep_its_points_are_reported(
    new_run, result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, _other = (
        new_run(name, result("linear_in1k", "feature4", "top1", 9.0, seed=seed))
        for seed, name in enumerate("ab")
    )
    sweep = Sweep(tmp_path / "sweeps" / "s")
    with sweep.locked():
        sweep.add(
            [Point(kind="evaluate", name="a", overrides=(), identity="a", folder=ours)],
            ["evaluate"],
        )
    assert main([str(sweep.folder)]) == 0
    output = capsys.readouterr().out
    assert "random, seed 0" in output
    assert "seed 1" not in output


@pytest.mark.parametrize(
    ("name", "begins"),
    [
        ("r.md", "# Our"),
        ("r.csv", "origin,group"),
        ("r.html", "<!DOCTYPE html>"),
        ("r.tex", "% Needs"),
    ],
)
def test_the_ending_of_the_file_decides_unless_a_format_is_given(
    runs: Path, tmp_path: Path, name: str, begins: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / name
    assert main([str(runs), "--out", str(out)]) == 0
    assert out.read_text(encoding="utf-8").startswith(begins)
    assert capsys.readouterr().out == f"report  {out}\n"
    assert main([str(runs), "--out", str(out), "--format", "csv", "--rows", "all"]) == 0
    assert "mmselfsup SwAV" in out.read_text(encoding="utf-8")
    other = tmp_path / "r.xml"
    assert main([str(runs), "--out", str(other), "--format", "latex"]) == 0
    assert other.read_text(encoding="utf-8").startswith("% Needs")


@pytest.mark.parametrize(("model", "fills"), [("resnet50", True), ("small", False)])
def test_the_card_is_offered_where_its_model_was_measured(
    new_run, result, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, fills: bool
) -> None:
    folder = new_run("a", result("linear_in1k", "feature4", "top1", 9.0, model=model))
    assert main([str(folder), "--out", str(tmp_path / "r.md")]) == 0
    assert ("next: " in capsys.readouterr().err) == fills


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--format", "pdf"], ["--format", "pdf", "markdown", "csv", "html", "latex"]),
        (["--rows", "best"], ["--rows", "best", "card", "all"]),
        (["--out", "card.xml"], ["--out", "card.xml", ".md", ".csv", ".html", ".tex", "--format"]),
        (["--out", "card"], ["--out", "card", ".md"]),
        (["--out", "none/r.md"], ["none/r.md", "No such file or directory", "--out"]),
        (["none"], ["none", "does not exist"]),
    ],
)
def test_a_mistake_is_one_message(
    runs: Path,
    arguments: list[str],
    named: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(runs.parent)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert not (runs.parent / "card.xml").exists()
    assert err.startswith("relloc: ")
    assert [word for word in named if word not in err] == []
    assert err.count("\n") == 1


def test_as_a_command_it_needs_no_torch(runs: Path) -> None:
    code = (
        "import sys, relloc.report; relloc.report.main(sys.argv[1:]); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(runs)], capture_output=True, text=True, check=True
    )
    assert "| random, seed 0 |" in " ".join(done.stdout.split())
