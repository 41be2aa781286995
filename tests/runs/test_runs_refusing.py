"""Tests that a refused run leaves its folder as it was, unless it trained or measured something."""

from pathlib import Path

import pytest

from relloc.checkpoints.backbone_files import BACKBONE_FILE
from relloc.results import RESULTS_FILE
from relloc.runs.refusing import STATES, FolderSnapshot
from relloc.tracking.journal import JOURNAL_FILE
from relloc.tracking.record import RUN_FILE, STATUS_FILE

CONFIG = ".hydra/config.yaml"


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def write(folder: Path, *names: str, text: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_a_new_folder_is_empty_again(tmp_path: Path) -> None:
    before = FolderSnapshot.of(tmp_path)
    write(tmp_path, RUN_FILE, STATUS_FILE, CONFIG, "mlflow.json", "patches.png", text="new")
    assert before.is_new
    assert before.has_same_results()
    before.restore(["patches.png"])
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_run_has_its_files_back(tmp_path: Path) -> None:
    write(tmp_path, RUN_FILE, CONFIG, "patches.png", "system.jsonl", "notes.txt", text="earlier")
    earlier = content(tmp_path)
    before = FolderSnapshot.of(tmp_path)
    write(tmp_path, RUN_FILE, CONFIG, STATUS_FILE, text="refused")
    assert not before.is_new
    before.restore(["patches.png"])  # it was there before, so it is not of the refused run alone
    assert content(tmp_path) == earlier


def test_what_nobody_names_stays(tmp_path: Path) -> None:
    before = FolderSnapshot.of(tmp_path)
    write(tmp_path, "mine.txt", f"{CONFIG}.mine", text="of the user")
    before.restore([])
    assert set(content(tmp_path)) == {"mine.txt", f"{CONFIG}.mine"}


@pytest.mark.parametrize(
    "name",
    [JOURNAL_FILE, RESULTS_FILE, BACKBONE_FILE, f"{STATES}/linear.pt", "checkpoints/step_1.pt"],
)
def test_work_is_what_was_trained_or_measured(tmp_path: Path, name: str) -> None:
    before = FolderSnapshot.of(tmp_path)
    write(tmp_path, name, text="one")
    assert not before.has_same_results()
    then = FolderSnapshot.of(tmp_path)
    assert then.has_same_results()
    write(tmp_path, name, text="another")  # of another size
    assert not then.has_same_results()


def test_a_damaged_status_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / STATUS_FILE).write_bytes(b"\xff")
    assert FolderSnapshot.of(tmp_path).status is None
