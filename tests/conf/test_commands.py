"""Every command written in conf/ composes; those of presets run where their images are."""

import re
import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from relloc.runs import build, settings
from relloc.runs.settings import conf_dir

COMMAND = re.compile(r"-m relloc\.(train|evaluate|prepare) +((?:\S+=\S+ ?|-m )+)")
STANDS_FOR = {"RUN_FOLDER": "random", "RUN": "random", "FILE.pth": "random", "NAME": "knn"}


def written_commands(*groups: str) -> list[tuple[str, str]]:
    """Returns each command that the YAML files of groups of conf/ write out, with its words."""
    files = [file for group in groups for file in sorted((conf_dir() / group).glob("*.yaml"))]
    found = [
        match.groups()
        for file in files
        for match in COMMAND.finditer(file.read_text(encoding="utf-8"))
    ]
    return list(dict.fromkeys((command, words.strip()) for command, words in found))


def as_typed(words: str, folder: Path) -> list[str]:
    """The words with files and folders that there are, and of a sweep those of its first point."""
    sweeps, typed = "-m" in words.split(), []
    for word in shlex.split(words):
        key, _, value = word.partition("=")
        if value == "glob(*)":
            value = settings.members(key)[0]
        if sweeps and not value.startswith("["):
            value = value.partition(",")[0]
        for name, meant in STANDS_FOR.items():
            value = re.sub(rf"\b{re.escape(name)}\b", meant, value)
        if re.fullmatch("IMAGENET|VOC|FOLDER|SHARDS|[A-Z]", value):
            value = str(folder)
        typed += [f"{key}={value}"] if value else []
    return typed


@pytest.mark.parametrize(
    ("command", "words"),
    written_commands(".", "eval", "data", "hydra/help", "launcher", "tracking"),
)
def test_a_command_composes(command: str, words: str, tmp_path: Path) -> None:
    config = settings.compose(command, as_typed(words, tmp_path)).config
    assert OmegaConf.to_container(config, resolve=True)


def test_commands_are_found() -> None:
    assert len(written_commands("hydra/help")) > 10
    written = {word for _, words in written_commands("experiment") for word in words.split()}
    for file in (conf_dir() / "experiment").glob("*.yaml"):
        assert f"experiment={file.stem}" in written


@pytest.mark.parametrize(("command", "words"), written_commands("experiment"))
def test_a_presets_own_command_can_be_run(
    command: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "RELLOC_IN1K",
        "RELLOC_VOC",
        "RELLOC_PLACES205",
    ):  # as the presets and conf/eval say
        monkeypatch.delenv(name, raising=False)
        if command == "evaluate":
            monkeypatch.setenv(name, str(tmp_path))
    config = settings.compose(command, [*as_typed(words, tmp_path), "tracking=none"]).config
    assert build.refusals(command, [config]) == [None]
