"""`eval=voc12aug_fcn` from the command line, on a VOC of a few images."""

from pathlib import Path

import numpy as np
from PIL import Image

from relloc.data.voc_masks import voc_colors
from relloc.results import read_results


def voc(root: Path, *, n_aug: int = 0) -> Path:
    """Six images for training and three for the test, of noise with a square of class 1."""
    base = root / "VOCdevkit" / "VOC2012"
    palette = [0] * 768
    for color, number in voc_colors().items():
        palette[3 * number : 3 * number + 3] = color
    for split, n, masks in (
        ("train", 6, "SegmentationClass"),
        ("val", 3, "SegmentationClass"),
        ("aug", n_aug, "SegmentationClassAug"),
    ):
        if not n:
            continue
        names = [f"{split}{number}" for number in range(n)]
        for number, name in enumerate(names):
            classes = np.zeros((40, 50), dtype=np.uint8)
            classes[10:30, 5 * number : 5 * number + 20] = 1
            classes[:2] = 255
            pixels = np.random.default_rng(number).integers(60, 120, (40, 50, 3), dtype=np.uint8)
            pixels[classes == 1] = (250, 240, 20)
            mask = Image.fromarray(classes)
            if masks == "SegmentationClass":
                mask.putpalette(palette)
            for folder, suffix, image in (
                ("JPEGImages", "jpg", Image.fromarray(pixels)),
                (masks, "png", mask),
            ):
                (base / folder).mkdir(parents=True, exist_ok=True)
                image.save(base / folder / f"{name}.{suffix}")
        lists = base / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{split}.txt").write_text("\n".join(names))
    return root


def words(root: Path, run: Path) -> list[str]:
    of = "eval.voc12aug_fcn"
    return [
        *("checkpoint=random", "model=small", "eval=voc12aug_fcn", "tracking=none", "workers=2"),
        *(f"{of}.data.root={root}", f"{of}.data.source.published_images=null"),
        *(f"{of}.iterations=6", f"{of}.batch=4", f"{of}.evaluate_every=3"),
        *(f"{of}.augment.box=[64,48]", f"{of}.augment.crop_px=48", f"{of}.view.box=[64,48]"),
        f"hydra.run.dir={run}",
    ]


def test_voc_is_segmented_with_and_without_the_masks_of_sbd(relloc, tmp_path: Path) -> None:
    n_images = {}
    for name, n_aug in (("without", 0), ("with", 4)):
        run = tmp_path / name
        done = relloc("evaluate", *words(voc(tmp_path / f"data_{name}", n_aug=n_aug), run))
        assert done.code == 0, done.text
        rows = {row.metric: row for row in read_results(run)}
        row = rows["miou"]
        assert row.headline
        assert (row.eval, row.kind, row.dataset, row.split) == (
            "voc12aug_fcn",
            "fine-tuned",
            "voc2012",
            "val",
        )
        assert (row.n, row.protocol) == (3, "3.10")
        assert 0 <= row.value <= 100
        assert rows["iou_aeroplane"].value >= 0
        (n_images[name],) = [text for text in row.deviations if "images instead of" in text]
        assert len(list((run / "evaluations").rglob("image_*.png"))) == 3
        assert "voc12aug_fcn" in done.text
    assert "6 images" in n_images["without"]
    assert "10 images" in n_images["with"]


def test_missing_test_images_are_told_before_the_training(relloc, tmp_path: Path) -> None:
    root = voc(tmp_path / "data")
    images = root / "VOCdevkit/VOC2012/JPEGImages"
    for name in ("val0", "val2"):
        (images / f"{name}.jpg").unlink()
    run = tmp_path / "run"
    done = relloc("evaluate", *words(root, run))
    assert done.code == 2
    assert "2 of 3 images" in done.text
    assert "val0.jpg" in done.text
    # Nothing was trained, so there are no curves.
    assert not list(run.rglob("journal.jsonl"))
