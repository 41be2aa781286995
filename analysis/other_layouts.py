"""Arranges class folders as Places205 or iNaturalist 2018 lie on disk, to try those evaluations.

python analysis/other_layouts.py LAYOUT FOLDER OUT: LAYOUT is places205 or inat18. FOLDER has
train/CLASS and val/CLASS. OUT gets the lists or annotation files of the layout, and in place of its
images a link to FOLDER.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from relloc.data.folder import class_folders
from relloc.errors import DataError

PLACES, INAT = "places205", "inat18"
# Where each layout has its images
IMAGES = {PLACES: "data/vision/torralba/deeplearning/images256", INAT: "train_val2018"}


def main(layout: str, folder: Path, out: Path) -> None:
    """Writes the layout to `out`, which must not have one yet."""
    # The images stay where they are
    splits = class_folders(name=layout, root=str(folder), train="train", val="val")
    link = out / IMAGES[layout]
    link.parent.mkdir(parents=True)
    link.symlink_to(folder.resolve())
    for split, images in (("train", splits.train), ("val", splits.held_out)):
        paths = [Path(images.source(index)) for index in range(len(images))]
        names = [path.relative_to(folder).as_posix() for path in paths]
        if images.labels is None:
            raise DataError(f"{folder / split} has no folders of classes")
        if layout == PLACES:
            _write_places(out, split, names, images.labels)
        else:
            _write_inat(out, split, names, images.labels, images.classes)


def _write_places(
    out: Path,
    split: str,
    names: Sequence[str],
    labels: Sequence[int],
) -> None:
    """Writes the list of a split of Places205: a line for each image, with its class number."""
    file = out / "trainvalsplit_places205" / f"{split}_places205.csv"
    file.parent.mkdir(exist_ok=True)
    lines = [f"{name} {label}\n" for name, label in zip(names, labels, strict=True)]
    file.write_text("".join(lines))


def _write_inat(
    out: Path,
    split: str,
    names: Sequence[str],
    labels: Sequence[int],
    classes: Sequence[str],
) -> None:
    """Writes the annotations of a split of iNaturalist 2018, which have the format of COCO."""
    images = []
    for number, name in enumerate(names):
        images.append({"id": number, "file_name": f"{IMAGES[INAT]}/{name}"})
    annotations = []
    for number, label in enumerate(labels):
        annotations.append({"id": number, "image_id": number, "category_id": label})
    categories = [{"id": label, "name": name} for label, name in enumerate(classes)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (out / f"{split}2018.json").write_text(json.dumps(content))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
