"""python -m relloc lists the commands, runs one, and knows which was meant."""

import os
import sys

import pytest

from relloc.__main__ import main

COMMANDS = ["prepare", "train", "evaluate", "study", "report", "export", "sync", "sweep"]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_it_lists_each_command_with_what_it_does(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 0
    lines = [
        line.split(maxsplit=3)
        for line in capsys.readouterr().out.splitlines()
        if "-m relloc." in line
    ]
    assert [line[2] for line in lines[: len(COMMANDS)]] == [f"relloc.{name}" for name in COMMANDS]
    assert all(len(line) == 4 for line in lines[: len(COMMANDS)])


def test_a_command_is_run_with_its_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setitem(os.environ, "HYDRA_FULL_ERROR", "0")
    monkeypatch.delitem(sys.modules, "relloc.train", raising=False)
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help", "grid.gap_px"])
    assert ended.value.code == 0
    assert "conf/grid/mmselfsup.yaml" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "message"), [("trian", "Did you mean train?"), ("seed=0", "relloc.train seed=0")]
)
def test_another_word_is_a_mistake(
    word: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word]) == 2
    assert message in capsys.readouterr().err
