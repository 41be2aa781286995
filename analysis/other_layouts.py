"""python analysis/other_layouts.py LAYOUT FOLDER OUT: class folders as Places205 or iNaturalist 2018 lie on disk.

FOLDER has train/CLASS and val/CLASS; OUT gets the lists or the annotation files, and a link to FOLDER in place of the
images. For trying those evaluations on other images.
"""

import json
import sys
from pathlib import Path

from relloc.data.folder import class_folders

PLACES, INAT = "places205", "inat18"
IMAGES = {PLACES: "data/vision/torralba/deeplearning/images256", INAT: "train_val2018"}


def main(layout: str, folder: Path, out: Path) -> None:
    splits = class_folders(name=layout, root=str(folder), train="train", val="val")
    link = out / IMAGES[layout]
    link.parent.mkdir(parents=True)
    link.symlink_to(folder.resolve())
    for split, images in (("train", splits.train), ("val", splits.held_out)):
        names = [Path(path).relative_to(folder).as_posix() for path in images.paths]
        if layout == PLACES:
            lists = out / "trainvalsplit_places205" / f"{split}_places205.csv"
            lists.parent.mkdir(exist_ok=True)
            lists.write_text(
                "".join(
                    f"{name} {label}\n" for name, label in zip(names, images.labels, strict=True)
                )
            )
            continue
        content = {
            "images": [
                {"id": n, "file_name": f"{IMAGES[INAT]}/{name}"} for n, name in enumerate(names)
            ],
            "annotations": [
                {"id": n, "image_id": n, "category_id": label}
                for n, label in enumerate(images.labels)
            ],
            "categories": [
                {"id": label, "name": name} for label, name in enumerate(images.classes)
            ],
        }
        (out / f"{split}2018.json").write_text(json.dumps(content))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
