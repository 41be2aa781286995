"""Checking and packing a data set as a user does, and training from what was packed."""

import contextlib
import hashlib
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from commands import Hold, descendants, start
from mixed_folder import BROKEN, write_many, write_mixed
from safetensors.torch import load_file
from tiny import TINY

from relloc.data.folder import folder
from relloc.data.manifest import UNFINISHED
from relloc.data.packing import Packing, pack
from relloc.data.shards import shards
from relloc.results import read_results
from relloc.tracking import RunRecord, read_journal

FOLDER = ("data=folder", "data.name=mine")


def hashes(out: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())
    }


def below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@contextlib.contextmanager
def unseen(total: int, done: int) -> Iterator[Callable[[int, str], None]]:
    yield lambda now, text: None


def test_a_check_alone_tells_and_writes_nothing(relloc, tmp_path):
    write_mixed(tmp_path / "originals")
    seen = (tmp_path / "originals/train/a/small.jpg").read_bytes()
    (tmp_path / "originals/val/b/seen.jpg").write_bytes(seen)
    before = below(tmp_path)
    done = relloc("prepare", *FOLDER, "data.root=originals", "workers=2", fresh=True)
    assert done.code == 1, done.text
    assert "more than data.unreadable_share=0.05 allows" in done.text
    assert below(tmp_path) == before
    assert re.search(r"LEAK: 1 images? .*\bval\b.*\btrain\b", done.text)
    assert "b/seen.jpg = a/small.jpg" in done.text
    assert "out=FOLDER packs" in done.text
    assert re.search(rf"train: {len(BROKEN)} images .*read", done.text)

    for wrong, told in (("quality=101", "quality is 101"), ("shortpx=2", "Did you mean short_px?")):
        refused = relloc("prepare", *FOLDER, "data.root=originals", "out=out", wrong)
        assert refused.code == 2
        assert told in refused.text
    assert below(tmp_path) == before


def alive(pids: Sequence[int]) -> list[int]:
    """Those of the processes that have not ended."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                found.append(pid)
    return found


def test_killed_in_the_middle_the_same_command_ends_with_the_same_bytes(
    relloc, tmp_path, tmp_path_factory
):
    root = write_many(tmp_path / "originals", 120, 12, height=400, width=500)
    line = (
        *FOLDER,
        "data.root=originals",
        "out=out",
        "images_per_shard=6",
        "workers=2",
        "short_px=200",
    )
    command = start(
        "relloc.prepare",
        *line,
        folder=tmp_path,
        output=tmp_path_factory.mktemp("output") / "output.txt",
        # Each of the two processes packs no more than half of its eleven parts.
        hold=Hold(function="relloc.data.packing:_pack_part", least=6),
    )
    assert command.wait_for(lambda: len(list(tmp_path.glob(f"out/{UNFINISHED}/*-*.json"))) >= 3), (
        command.text
    )
    writing = descendants(command.pid)
    assert writing
    os.kill(command.pid, signal.SIGKILL)
    assert command.wait() == -signal.SIGKILL
    command.go_on()
    deadline = time.monotonic() + 120
    while alive(writing) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(writing)  # nobody goes on writing
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("out/*.tar")}
    assert 3 <= len(kept) < 22
    assert not (tmp_path / "out/manifest.json").exists()

    other = relloc("prepare", *line, "quality=80")
    assert other.code == 2
    assert "quality was 90, now 80" in other.text
    again = relloc("prepare", *line)
    assert again.code == 0, again.text
    assert "python -m relloc.train data=folder data.shards=out" in again.text
    written = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("out/*.tar")}
    # A tar whose record was not yet written when the kill came is written again.
    assert sum(written[name] == born for name, born in kept.items()) >= len(kept) - 2

    settings = Packing(short_px=200, quality=90, subsampling="4:2:0", images_per_shard=6)
    undisturbed = folder(name="mine", root=str(root), held_out_share=0.05)
    pack(undisturbed, tmp_path / "straight", settings, workers=1, progress=unseen)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "straight")
    assert sorted(os.listdir(tmp_path)) == ["originals", "out", "straight"]  # no run folder


def test_training_from_shards_of_kept_images_gives_the_weights_of_training_from_the_folder(
    relloc, tmp_path
):
    write_many(tmp_path / "originals", 40, 8)
    (tmp_path / "originals/train/a/0010.jpg").write_bytes(b"broken")
    packed = relloc("prepare", *FOLDER, "data.root=originals", "out=out", "images_per_shard=7")
    assert packed.code == 0, packed.text
    stored = json.loads((tmp_path / "out/manifest.json").read_bytes())["train"]["stored"]
    counts = {"kept": 39, "unreadable": 1, "encoded": 0, "reduced": 0, "enlarged": 0}
    assert stored == counts
    assert shards(root=str(tmp_path / "out")).labeled
    line = (*FOLDER, "data.root=originals", "out=pixels", "format=pixels", "short_px=96")
    packed = relloc("prepare", *line)
    assert packed.code == 0, packed.text
    assert "39 images kept in their size" in packed.text

    tiny = [word for word in TINY if not word.startswith("data.source.")]
    line = (
        *FOLDER,
        *tiny,
        "data.root=originals",
        "schedule.epochs=1",
        "schedule.milestone_epochs=[]",
        "eval=[]",
    )
    weights = []
    packings = (("folder", ()), ("jpegs", ("data.shards=out",)), ("px", ("data.shards=pixels",)))
    for name, more in packings:
        run_dir = tmp_path / name
        done = relloc("train", *line, *more, "tracking=none", f"hydra.run.dir={run_dir}")
        assert done.code == 0, done.text
        weights.append(load_file(run_dir / "backbone.safetensors"))
    from_folder, from_jpegs, from_pixels = weights
    for name, expected in from_folder.items():
        assert torch.equal(expected, from_jpegs[name])
        assert torch.equal(expected, from_pixels[name])
    said = [RunRecord.read(tmp_path / name).tags.get("relloc.packed") for name, _ in packings]
    assert said == [
        None,
        "JPEG of quality 90 4:2:0, short side of at most 292 px",
        "pixels, short side 96 px",
    ]


def test_a_training_from_enlarged_pixels_goes_on_to_the_bit_and_is_evaluated(
    relloc, tmp_path, tmp_path_factory
):
    write_many(tmp_path / "originals", 40, 8, height=40, width=51)
    words = ("data.root=originals", "out=pixels", "format=pixels", "short_px=64", "workers=2")
    packed = relloc("prepare", *FOLDER, *words, "images_per_shard=7")
    assert packed.code == 0, packed.text
    assert "40 enlarged" in packed.text

    tiny = [word for word in TINY if not word.startswith("data.source.")]
    line = (
        *FOLDER,
        *tiny,
        "data.shards=pixels",
        "schedule.milestone_epochs=[]",
        "tracking=none",
        "workers=2",
        "report_every_steps=1",
    )
    # Two steps, with a file of 40 images that crops are only cut from
    two_steps = relloc("train", *line, "schedule.epochs=1", "eval=[knn]", "hydra.run.dir=two")
    assert two_steps.code == 0, two_steps.text
    assert read_journal(tmp_path / "two")[-1].step == 2
    assert "each crop" not in two_steps.text
    assert any(row.eval == "knn" for row in read_results(tmp_path / "two"))

    longer = (*line, "schedule.epochs=10", "eval=[]", "save_every_s=0")
    undisturbed = relloc("train", *longer, "hydra.run.dir=undisturbed")
    assert undisturbed.code == 0, undisturbed.text
    command = start(
        "relloc.train",
        *longer,
        "hydra.run.dir=killed",
        folder=tmp_path,
        output=tmp_path_factory.mktemp("output") / "output.txt",
        hold=Hold(function="relloc.tracking.journal:Journal.log", of="step", least=19),
    )
    killed = tmp_path / "killed"
    assert command.wait_for(lambda: len(read_journal(killed)) >= 5), command.text
    assert command.kill() == -signal.SIGKILL
    again = relloc("train", *longer, "hydra.run.dir=killed")
    assert again.code == 0, again.text
    assert "resume" in again.text
    weights = [
        load_file(tmp_path / name / "backbone.safetensors") for name in ("undisturbed", "killed")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    # A grid of another size resizes each crop again, which is said.
    other = relloc(
        "train", *line, "schedule.epochs=1", "eval=[]", "grid.resize.px=60", "hydra.run.dir=other"
    )
    assert other.code == 0, other.text
    assert re.search(r"short side of 64 px.*60 px.*short_px=60", other.text)
