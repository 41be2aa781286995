"""What Tab offers at the end of a `relloc` line, asked as bash asks it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from relloc.__main__ import COMMANDS
from relloc.runs.completion import BASH_SCRIPT, candidates


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("relloc tr", ["train"]),
        ("relloc ", sorted(COMMANDS)),
        (
            "relloc train model=",
            ["model=alexnet", "model=resnet18", "model=resnet50", "model=small"],
        ),
        ("relloc train model=resnet50 model.head.dr", ["model.head.dropout="]),
        ("relloc train grid.res", ["grid.resize."]),
        ("relloc evaluate reuse=", ["reuse=false", "reuse=true"]),
        ("relloc sweep w", ["wait"]),
        ("relloc export ", []),
    ],
)
def test_a_line_is_completed(line: str, expected: list[str]) -> None:
    assert candidates(line, COMMANDS) == expected


def test_a_setting_or_a_group_can_be_chosen() -> None:
    offered = candidates("relloc train gri", COMMANDS)
    assert offered == ["grid.", "grid="]
    assert {"grid.gap_px=", "grid.jitter_px="} <= set(candidates("relloc train grid.", COMMANDS))


def test_sweeps_are_offered_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELLOC_RUNS", str(tmp_path))
    for name in ("gaps", "gammas", "other"):
        (tmp_path / "sweeps" / name).mkdir(parents=True)
    assert candidates("relloc sweep status ga", COMMANDS) == ["gammas", "gaps"]
    assert candidates("relloc report sweep=o", COMMANDS) == ["sweep=other"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("relloc train color=dr", ["drop"]),
        ("relloc evaluate --help grid", []),
        ("relloc rep", ["report"]),
    ],
)
def test_bash_asks_and_understands_the_answer(line: str, words: list[str], tmp_path: Path) -> None:
    script = tmp_path / "relloc"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m relloc "$@"\n')
    script.chmod(0o755)
    breaks = r"""COMP_WORDBREAKS=$' \t\n"\'><=;|&(:'"""
    asked = (
        f'{breaks}; COMP_LINE=$1 COMP_POINT=${{#1}}; _relloc; printf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    done = subprocess.run(
        ["bash", "-c", f"{BASH_SCRIPT}\n{asked}", "bash", line],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == words
