"""Tests what `relloc.prepare` prints about checking and packing."""

import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from mixed_folder import BROKEN, write_mixed

from relloc.data.manifest import MANIFEST
from relloc.runs import build
from relloc.runs.invocation import Invocation
from relloc.runs.preparing import prepare
from relloc.runs.settings import conf_dir


def run(*words: str, chosen: str = "folder") -> None:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        settings = build.preparing(
            compose("prepare", ["data=folder", "data.name=mine", "workers=1", *words])
        )
    invocation = Invocation(
        command="prepare",
        folder=Path(),
        names_folder=False,
        words=("data=folder", *words),
        choices={"data": chosen},
        settings={},
        files={},
    )
    prepare(settings, invocation)


@pytest.fixture
def originals(tmp_path: Path) -> Path:
    return write_mixed(tmp_path / "originals")


def test_a_check_names_findings_and_the_command_that_packs(
    originals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(f"data.root={originals}")
    told = capsys.readouterr().out
    assert "mine, as checked" in told
    assert f"train: {len(BROKEN)} images can't be read" in told
    assert (
        f"next: python -m relloc.prepare data=folder data.root={originals} out=SHARDS"
        in told.replace("\n", " ")
    )
    assert not list(tmp_path.rglob(MANIFEST))


def test_packing_tells_what_became_of_images_and_how_to_train_on_them(
    originals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "packed"
    run(f"data.root={originals}", f"out={out}", "short_px=96")
    told = capsys.readouterr().out.replace("\n", " ")
    assert "packed  train: " in told
    assert re.search(r"2 JPEGs kept.*3 reduced to 96 px.*3 encoded", told)
    next_command = f"next: python -m relloc.train data=folder data.shards={out}"
    assert next_command in told
    assert (out / MANIFEST).is_file()
    # What is packed is checked by its hashes, and has no command that packs it again.
    run(f"data.shards={out}")
    told = capsys.readouterr().out.replace("\n", " ")
    assert "checked " in told
    assert "out=SHARDS" not in told
    assert next_command in told
    run(f"data.shards={out}", chosen="photos")  # as where no data= was typed
    assert next_command in capsys.readouterr().out.replace("\n", " ")
