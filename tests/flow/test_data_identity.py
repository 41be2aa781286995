"""What a run's images are told apart by: what they hold, not what they are called."""

import re
import shutil
from pathlib import Path

from mixed_folder import write_many
from tiny import TINY


def replace_one(root: Path) -> None:
    """Other pixels in a file of the same name and size."""
    path = root / "train/a/0000.jpg"
    content = bytearray(path.read_bytes())
    content[-100:-20] = bytes(80)
    path.write_bytes(content)


def test_a_training_goes_on_with_a_copy_and_not_with_replaced_images(relloc, tmp_path):
    root = write_many(tmp_path / "originals", 40, 8)
    tiny = [word for word in TINY if not word.startswith("data.source.")]
    line = (
        "data=folder",
        "data.name=mine",
        *tiny,
        "eval=[]",
        "tracking=none",
        "monitor.every_epochs=null",
    )
    line += (f"hydra.run.dir={tmp_path / 'run'}", "schedule.milestone_epochs=[]")
    first = relloc("train", *line, "data.root=originals")
    assert first.code == 0, first.text
    assert re.search(r"train: 40 images .*\b2 classes.* val: 8 images .*\b2 classes", first.text)
    shutil.copytree(root, tmp_path / "copy")
    copied = relloc("train", *line, "data.root=copy")
    assert copied.code == 0, copied.text
    assert "resume" in copied.text

    replace_one(root)
    replaced = relloc("train", *line, "data.root=originals")
    assert replaced.code == 2
    assert "training images was" in replaced.text


def test_a_split_that_would_be_trained_on_is_refused_before_anything_is_written(relloc, tmp_path):
    root = write_many(tmp_path / "set", 40, 8)
    (root / "val").rename(root / "test")
    tiny = [word for word in TINY if not word.startswith("data.source.")]
    refused = relloc(
        "train", "data=folder", "data.root=set", *tiny, "tracking=none", "hydra.run.dir=run"
    )
    assert refused.code == 2
    assert "data.source.train=train data.source.val=test" in refused.text
    assert not (tmp_path / "run/results.jsonl").exists()
    taken = relloc("prepare", "data=folder", "data.root=set", "data.source.val=test", "workers=1")
    assert taken.code == 0, taken.text
    assert re.search(r"train: 40 images .*\b2 classes.* test: 8 images .*\b2 classes", taken.text)
