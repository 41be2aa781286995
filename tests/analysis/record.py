"""Records the small set of runs that the notebooks are tested on, tests/analysis/recorded.tar.xz.

python tests/analysis/record.py

It trains the smallest networks that have everything a notebook reads: a sweep of gap and jitter
with two seeds, one training of twice the length, and low-shot SVMs of one of them on images that
are made here. Of each run folder it keeps what notebooks read, and no weights. It takes about ten
minutes on two cores. Numbers change a little with the processor: where the tests ask for numbers,
these have to be read again from the recorded files.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from relloc.data.lists import VOC_CLASSES

HERE = Path(__file__).parent
RECORDED = HERE / "recorded.tar.xz"
# What run folders lie below in what is recorded, in place of where they were made.
RUNS = "/recorded/runs"
KEPT = ("run.json", "results.jsonl", "journal.jsonl", "point.json", "artifacts.json", "status.json")
# The photographs at a scale at which a run takes seconds.
SMALL = (
    "model=small",
    "data=photos",
    "data.source.tiles=[0.4]",
    "data.source.stride=0.5",
    "recipe.images_per_step=16",
    "recipe.images_per_batch_norm=16",
    "grid.patch_px=16",
    "grid.resize.px=72",
    "schedule=constant",
    "schedule.epochs=3",
    "optimizer.lr=0.02",
    "report_every_steps=2",
    "monitor.most_share=1",
    "view.short_px=64",
    "view.crop_px=56",
    "probe.linear.epochs=4",
    "probe.linear.milestone_epochs=[2]",
    "eval=[linear_fast,knn,label_free]",
    "eval.knn.k=[20]",
    "eval.label_free.lidar=null",
    "eval.label_free.dse=null",
    "tracking=none",
    "workers=0",
)


def relloc(folder: Path, command: str, *words: str) -> None:
    """Runs a command of relloc with `folder` as its folder of runs."""
    line = [sys.executable, "-m", f"relloc.{command}", *words]
    variables = os.environ | {"RELLOC_RUNS": str(folder)}
    subprocess.run(line, check=True, cwd=folder.parent, env=variables)


def make_voc(root: Path) -> None:
    """Writes 240 noise images of eight classes in the layout of VOC2007."""
    base = root / "VOCdevkit" / "VOC2007"
    for folder in ("JPEGImages", "ImageSets/Main"):
        (base / folder).mkdir(parents=True)
    generator = np.random.default_rng(0)
    # 20 images of each class to train on: k = 4 needs 19 times as many of other classes.
    for split, n in (("trainval", 160), ("test", 80)):
        names = [f"{split}{number:03d}" for number in range(n)]
        for number, name in enumerate(names):
            # Classes are stripes of eight widths, in noise that hides them from few examples.
            pixels = generator.normal(110, 40, (40, 40, 3))
            pixels[:, np.arange(40) % (2 + number % 8) == 0] += 60
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(base / "JPEGImages" / f"{name}.jpg")
        (base / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names))
        for place, shown in enumerate(VOC_CLASSES):
            lines = []
            for number, name in enumerate(names):
                is_shown = number % 8 == place
                lines.append(f"{name} {1 if is_shown else -1}")
            (base / "ImageSets" / "Main" / f"{shown}_{split}.txt").write_text("\n".join(lines))


def train(runs: Path) -> None:
    """Trains and evaluates all recorded networks."""
    grid = ("grid.gap_px=0,4,8", "grid.jitter_px=0,2", "seed=0,1", "sweep=gaps")
    relloc(runs, "train", "-m", *SMALL, *grid)
    long = ("grid.gap_px=8", "grid.jitter_px=0", "schedule.epochs=6", f"hydra.run.dir={runs}/long")
    relloc(runs, "train", *SMALL, *long)
    make_voc(runs.parent / "voc")
    low_shot = (
        "model=small",
        "eval=voc07_low_shot",
        f"eval.voc07_low_shot.data.root={runs.parent}/voc",
        "eval.voc07_low_shot.data.source.published_images=null",
        "eval.voc07_low_shot.layers=[feature2,feature4]",
        "eval.voc07_low_shot.view.short_px=40",
        "eval.voc07_low_shot.view.side_px=32",
        "eval.voc07_low_shot.shots=[1,2,4]",
        "eval.voc07_low_shot.draws=3",
        "tracking=none",
        "workers=0",
        f"hydra.run.dir={runs}/low_shot",
    )
    both = f"checkpoint=[{runs}/long,random]"
    relloc(runs, "evaluate", both, *low_shot)
    studied = (
        "model=small",
        "data=photos",
        "data.source.tiles=[0.4]",
        "data.source.stride=0.5",
        "view.short_px=64",
        "view.crop_px=56",
        "study=[neighbors,discovery,shortcuts]",
        "study.neighbors.layers=[embedding,feature3,feature4]",
        "study.neighbors.sides_px=[32]",
        "study.neighbors.patch_px=32",
        "study.neighbors.queries=40",
        # Classes are photographs: otherwise none of the neighbors would have the query's.
        "study.neighbors.own_image=true",
        "study.neighbors.one_per_image=false",
        "study.discovery.sides_px=[32,48]",
        "study.discovery.patch_px=32",
        "study.discovery.n_seeds=40",
        "study.discovery.set_size=2",
        "study.shortcuts.layers=[feature3,feature4]",
        "study.shortcuts.patch_px=16",
        "study.shortcuts.short_px=72",
        "study.shortcuts.noise_images=64",
        "study.shortcuts.border_px=4",
        "study.shortcuts.shift_px=1",
        "tracking=none",
        "workers=0",
        f"hydra.run.dir={runs}/studies",
    )
    relloc(runs, "study", both, *studied)


def keep(runs: Path) -> None:
    """Packs what notebooks read of all runs into `RECORDED`, with neutral paths."""
    files = []
    for name in KEPT:
        files += runs.glob(f"*/{name}")
    files += runs.glob("sweeps/*/*.json")
    with tarfile.open(RECORDED, "w:xz") as archive:
        for file in sorted(files):
            text = file.read_text().replace(str(runs), RUNS)
            text = text.replace(str(runs.parent), str(Path(RUNS).parent))
            if file.name == "run.json":
                text = json.dumps(_without_machine(json.loads(text)), indent=1) + "\n"
            content = text.encode()
            entry = tarfile.TarInfo(str(file.relative_to(runs)))
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def _without_machine(record: dict) -> dict:
    """Returns a run record without the names of the machine it was made on."""
    kept = {"relloc.kind", "relloc.commit", "relloc.version", "relloc.sweep"}
    tags = {name: value for name, value in record["tags"].items() if name in kept}
    return record | {"tags": tags, "tracking_uri": ""}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "runs"
        runs.mkdir()
        train(runs)
        keep(runs)
