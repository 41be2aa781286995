from pathlib import Path

from relloc.checkpoints.backbone_files import BACKBONE_FILE
from relloc.checkpoints.states import save_training
from relloc.tracking import RunRecord
from relloc.tracking.journal import Journal
from relloc.tracking.run_lock import locked_run_folder
from relloc.tracking.unfinished import unfinished_training


def begin(run_dir: Path, kind: str = "train") -> None:
    params = {"schedule.epochs": 50}
    RunRecord(name="a", experiment="b", tags={"relloc.kind": kind}, params=params).write(run_dir)


def test_a_stopped_training_tells_how_far_it_is_and_how_it_goes_on(tmp_path: Path) -> None:
    begin(tmp_path)
    command = f"command with hydra.run.dir={tmp_path}"
    message = unfinished_training(tmp_path)
    assert "was stopped at step 0," in message
    assert command in message
    Journal(tmp_path).log({"train/epoch": 0.5}, 47)
    save_training(tmp_path, {}, 52)
    message = unfinished_training(tmp_path)
    assert "stopped at step 52 of 4700" in message
    assert command in message
    with locked_run_folder(tmp_path):
        assert "is being trained" in unfinished_training(tmp_path)


def test_nothing_is_told_of_other_folders(tmp_path: Path) -> None:
    assert unfinished_training(tmp_path) == ""
    begin(tmp_path, kind="evaluate")
    assert unfinished_training(tmp_path) == ""
    begin(tmp_path)
    (tmp_path / BACKBONE_FILE).touch()
    assert unfinished_training(tmp_path) == ""
