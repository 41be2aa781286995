"""Small annotated data sets in the layouts that they are downloaded in."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from mixed_folder import jpeg, picture
from PIL import Image
from scipy.io import savemat

from relloc.data.check import Check, check
from relloc.data.image_set import Splits

HEIGHT, WIDTH = 70, 90
TRIANGLE = [10.0, 10.0, 40.25, 12.5, 20.0, 50.75]


@contextmanager
def unseen(total: int, done: int) -> Iterator[Any]:
    del total, done
    yield lambda now, text: None


def checked(splits: Splits) -> Check:
    return check(splits, workers=1, progress=unseen)


def write_image(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(picture(HEIGHT, WIDTH, seed)))


def write_text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def voc_object(name: str, box: Sequence[object], difficult: int = 0) -> str:
    corners = "".join(
        f"<{corner}>{value}</{corner}>"
        for corner, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    # Persons have the boxes of their parts, too.
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    return (
        f"<object><name>{name}</name><difficult>{difficult}</difficult>"
        f"<bndbox>{corners}</bndbox>{part}</object>"
    )


def voc_annotation(*objects: str, height: object = HEIGHT, width: object = WIDTH) -> str:
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation>\n{size}\n{''.join(objects)}\n</annotation>\n"


# Names of images by year and list.
VOC_LISTS = {
    2007: {"trainval": ("000005", "000007"), "test": ("000001",)},
    2012: {"trainval": ("2008_000002",)},
}


def write_voc(root: Path) -> Path:
    """VOCdevkit/{VOC2007,VOC2012} with a dog in each image."""
    seed = 0
    for year, lists in VOC_LISTS.items():
        devkit = root / "VOCdevkit" / f"VOC{year}"
        for split, names in lists.items():
            write_text(
                devkit / f"ImageSets/Main/{split}.txt", "".join(f"{name}\n" for name in names)
            )
            for name in names:
                seed += 1
                write_image(devkit / "JPEGImages" / f"{name}.jpg", seed)
                dog = voc_object("dog", (11, 21, 31, 61))
                write_text(devkit / "Annotations" / f"{name}.xml", voc_annotation(dog))
    return root


# Proposals of the images of VOC2007, as the files have them: y1, x1, y2, x2, counted from 1.
VOC_PROPOSALS = ((21, 11, 61, 31), (1, 1, HEIGHT, WIDTH), (30, 40, 50, 60))


def write_proposals(folder: Path, **cells: Sequence[Any]) -> Path:
    """The .mat files of fast-rcnn for VOC2007; `cells` are the matrices of a split's images."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, names in VOC_LISTS[2007].items():
        matrices = cells.get(split)
        if matrices is None:
            matrices = [np.array(VOC_PROPOSALS, np.uint16) for _ in names]
        boxes = np.empty((1, len(matrices)), dtype=object)
        for column, matrix in enumerate(matrices):
            boxes[0, column] = matrix
        images = np.array([list(names)], dtype=object)
        content = {"boxes": boxes, "images": images}
        savemat(folder / f"voc_2007_{split}.mat", content, do_compression=True)
    return folder


def annotation_file(root: Path, name: str = "000005") -> Path:
    """The annotation of an image of VOC2007."""
    return root / f"VOCdevkit/VOC2007/Annotations/{name}.xml"


def write_mask(
    path: Path,
    values: Mapping[tuple[int, int], int] | None = None,
    *,
    mode: str = "L",
    fill: int = 0,
) -> Path:
    """A mask of the size of images, with single pixels (row, column) of other values."""
    mask = np.full((HEIGHT, WIDTH), fill, np.uint8)
    for place, value in (values or {}).items():
        mask[place] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(mask)
    if mode == "P":
        image = image.convert("L")
        image.putpalette(voc_palette())
    image.save(path)
    return path


def voc_palette() -> list[int]:
    """The first 256 colors of VOC's own masks, as its toolkit gives them (VOClabelcolormap.m)."""
    colors = []
    for number in range(256):
        red = green = blue = 0
        rest = number
        for shift in range(7, -1, -1):
            red |= (rest & 1) << shift
            green |= (rest >> 1 & 1) << shift
            blue |= (rest >> 2 & 1) << shift
            rest >>= 3
        colors += [red, green, blue]
    return colors


def write_voc_masks(root: Path, *, aug: bool) -> Path:
    """VOCdevkit/VOC2012 with palette masks: 2 images to train on, 1 held out, 2 of SBD."""
    devkit = root / "VOCdevkit/VOC2012"
    lists = {"train": ("2007_000032", "2007_000039"), "val": ("2007_000033",)}
    if aug:
        lists["aug"] = ("2008_000003", "2008_000007")
    for split, names in lists.items():
        path = devkit / f"ImageSets/Segmentation/{split}.txt"
        write_text(path, "".join(f"{name}\n" for name in names))
        for name in names:
            write_image(devkit / "JPEGImages" / f"{name}.jpg", int(name.replace("_", "")))
            values = {(3, 4): 1, (5, 6): 20, (7, 8): 255}
            if split == "aug":
                write_mask(devkit / f"SegmentationClassAug/{name}.png", {(3, 4): 15})
            else:
                write_mask(devkit / f"SegmentationClass/{name}.png", values, mode="P")
    return root


CATEGORIES = [
    {"id": 7, "name": "train"},
    {"id": 1, "name": "person"},
    {"id": 90, "name": "toothbrush"},
]


def coco_annotation(number: int, image: int, **others: object) -> dict[str, object]:
    return {
        "segmentation": [TRIANGLE],
        "area": 560.5,
        "iscrowd": 0,
        "image_id": image,
        "bbox": [10.0, 10.0, 30.25, 40.75],
        "category_id": 1,
        "id": number,
        **others,
    }


def crowd_annotation(number: int, image: int) -> dict[str, object]:
    counts = [100, 50, HEIGHT * WIDTH - 150]
    mask = {"counts": counts, "size": [HEIGHT, WIDTH]}
    return coco_annotation(
        number, image, segmentation=mask, iscrowd=1, bbox=[1, 0, 2, 70], category_id=90
    )


def coco_content(images: Sequence[int], annotations: Sequence[object]) -> dict[str, Any]:
    entries = [
        {"id": number, "file_name": f"{number:012d}.jpg", "height": HEIGHT, "width": WIDTH}
        for number in images
    ]
    return {
        "info": {"description": "COCO 2017 Dataset", "year": 2017},
        "licenses": [],
        "images": entries,
        "annotations": list(annotations),
        "categories": CATEGORIES,
    }


def write_coco(root: Path, annotations: Sequence[object] | None = None) -> Path:
    """COCO with images 9, 25, 30 to train on, and 139 held out."""
    if annotations is None:
        annotations = [
            coco_annotation(40, 25),
            coco_annotation(41, 9, category_id=7),
            crowd_annotation(42, 25),
        ]
    contents = {
        "train2017": coco_content((9, 25, 30), annotations),
        "val2017": coco_content((139,), [coco_annotation(1, 139)]),
    }
    for split, content in contents.items():
        write_text(root / f"annotations/instances_{split}.json", json.dumps(content))
        for entry in content["images"]:
            write_image(root / split / entry["file_name"], entry["id"])
    return root


def write_cityscapes(root: Path, suffix: str = "labelTrainIds") -> Path:
    """Cityscapes with two cities to train on and one held out."""
    cities = {"train": ("aachen", "bochum"), "val": ("frankfurt",)}
    for split, names in cities.items():
        for city in names:
            stem = f"{city}_000000_000019"
            write_image(root / f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png")
            path = root / f"gtFine/{split}/{city}/{stem}_gtFine_{suffix}.png"
            values = {(3, 4): 18, (5, 6): 255}
            if suffix == "labelIds":
                values = {(3, 4): 33, (5, 6): 0}
            write_mask(path, values, fill=0 if suffix == "labelTrainIds" else 7)
    return root
