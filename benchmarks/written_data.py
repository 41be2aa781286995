"""Writes photographs, and small data sets laid out as PASCAL VOC, COCO and Cityscapes.

Images are cut from the photographs that scikit-image ships, at random places and scales, and have
the sizes of the real ones. Objects are ellipses at random places: as many an image as in the real
sets, with boxes and masks. Nothing can be learned from them, but to read them and to train on them
costs what it does with the real ones.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from scipy.io import savemat

from relloc.data.cityscapes import CLASSES as CITYSCAPES_CLASSES
from relloc.data.lists import VOC_CLASSES
from relloc.data.photos import read_photo
from relloc.data.voc_masks import voc_colors

_PHOTOS = ("astronaut", "chelsea", "coffee", "motorcycle", "retina", "rocket")
# Bytes a pixel come near those of VOC and COCO at this JPEG quality.
_QUALITY = 95
# Objects an image: 2.9 in VOC2007+2012 trainval with difficult ones, 7.3 in COCO train2017.
_VOC_OBJECTS = 2.9
_COCO_OBJECTS = 7.3
# About as many as selective search finds in an image of VOC2007.
_VOC_PROPOSALS = 2_000
# A Cityscapes image has about 20 labeled objects, beside road, buildings and sky.
_CITYSCAPES_OBJECTS = 20
_COCO_CLASSES = 80
_POLYGON_CORNERS = 24
# About a quarter of the images of VOC and COCO stand upright.
_SHARE_UPRIGHT = 0.25


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Ellipse:
    """An object: an ellipse of a class, with its center and half axes in pixels."""

    class_: int
    center: tuple[float, float]  # x, y
    half_axes: tuple[float, float]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom."""
        (x, y), (half_width, half_height) = self.center, self.half_axes
        return x - half_width, y - half_height, x + half_width, y + half_height

    def polygon(self) -> Float[np.ndarray, "corners 2"]:
        """Returns the corners of a polygon along the ellipse."""
        angles = np.linspace(0, 2 * np.pi, _POLYGON_CORNERS, endpoint=False)
        circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        return np.array(self.center) + circle * self.half_axes

    def inside(self, height: int, width: int) -> Bool[np.ndarray, "{height} {width}"]:
        """Returns which pixels of an image lie inside."""
        rows = (np.arange(height) - self.center[1]) / self.half_axes[1]
        columns = (np.arange(width) - self.center[0]) / self.half_axes[0]
        return rows[:, None] ** 2 + columns[None] ** 2 < 1


def write_photographs(folder: Path, n_images: int) -> None:
    """Writes JPEGs of 500 x 375 px, the most frequent size in ImageNet, upright ones among them."""

    def write(number: int) -> None:
        rng = np.random.default_rng(number)
        height, width = _size(rng, 375, 500)
        _save(_photograph(rng, height, width), folder / f"{number:06d}.jpg")

    _in_threads(write, n_images)


def write_voc(root: Path, n_images: int, n_tested: int = 8) -> None:
    """Writes VOC2007 and VOC2012 with boxes and class maps, so many to train on and to test on."""
    names = [f"{number:06d}" for number in range(n_images + n_tested)]
    trained, tested = names[:n_images], names[n_images:]
    lists = {
        ("VOC2007", "Main", "trainval"): trained[::2],
        ("VOC2007", "Main", "test"): tested,
        ("VOC2012", "Main", "trainval"): trained[1::2],
        ("VOC2012", "Segmentation", "train"): trained,
        ("VOC2012", "Segmentation", "val"): tested,
    }
    for (year, kind, split), listed in lists.items():
        folder = root / "VOCdevkit" / year / "ImageSets" / kind
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{split}.txt").write_text("\n".join(listed) + "\n")

    def write(number: int) -> None:
        rng = np.random.default_rng(number)
        height, width = _size(rng, 375, 500)
        objects = _objects(rng, height, width, _VOC_OBJECTS, len(VOC_CLASSES))
        pixels = _photograph(rng, height, width)
        # Background is 0, so that the number of a class is one more.
        class_map = _class_map(objects, np.zeros((height, width), np.uint8), first_class=1)
        for year in ("VOC2007", "VOC2012"):
            folder = root / "VOCdevkit" / year
            _save(pixels, folder / "JPEGImages" / f"{names[number]}.jpg")
            mask = folder / "SegmentationClass" / f"{names[number]}.png"
            _save(class_map, mask, palette=_voc_palette())
            annotation = folder / "Annotations" / f"{names[number]}.xml"
            annotation.parent.mkdir(parents=True, exist_ok=True)
            annotation.write_text(_voc_annotation(objects, height, width))

    _in_threads(write, len(names))


def write_voc_with_proposals(root: Path, n_images: int, n_tested: int = 8) -> None:
    """Writes what `write_voc` writes, and random proposals of the images of VOC2007.

    They lie in root/proposals, as the files of fast-rcnn's selective_search_data.tgz have them.
    """
    write_voc(root, n_images, n_tested)
    folder = root / "proposals"
    folder.mkdir()
    for split in ("trainval", "test"):
        listed = root / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main" / f"{split}.txt"
        names = listed.read_text().split()
        cells = np.empty((1, len(names)), dtype=object)
        for place, name in enumerate(names):
            # The generator of the image, whose first number decides its size.
            rng = np.random.default_rng(int(name))
            height, width = _size(rng, 375, 500)
            # In order, counted from 1.
            rows = np.sort(rng.integers(1, height + 1, (_VOC_PROPOSALS, 2)), axis=1)
            columns = np.sort(rng.integers(1, width + 1, (_VOC_PROPOSALS, 2)), axis=1)
            y1, y2 = rows.T
            x1, x2 = columns.T
            cells[0, place] = np.stack([y1, x1, y2, x2], axis=1).astype(np.uint16)
        content = {"boxes": cells, "images": np.array([names], dtype=object)}
        savemat(folder / f"voc_2007_{split}.mat", content, do_compression=True)


def write_coco(root: Path, n_images: int, n_tested: int = 8) -> None:
    """Writes train2017 of n_images, and val2017 of n_tested, with boxes and polygons."""
    for split, numbers in (
        ("train2017", range(n_images)),
        ("val2017", range(n_images, n_images + n_tested)),
    ):
        images, annotations = [], []
        for number in numbers:
            rng = np.random.default_rng(number)
            height, width = _size(rng, 480, 640)
            name = f"{number:012d}.jpg"
            images.append({"id": number, "file_name": name, "height": height, "width": width})
            for each in _objects(rng, height, width, _COCO_OBJECTS, _COCO_CLASSES):
                annotations.append(_coco_annotation(each, number, len(annotations) + 1))
        categories = [{"id": n + 1, "name": f"class {n}"} for n in range(_COCO_CLASSES)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        path = root / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        _in_threads(functools.partial(_save_photograph, root / split, images), len(images))


def _save_photograph(folder: Path, images: Sequence[dict[str, Any]], place: int) -> None:
    image = images[place]
    rng = np.random.default_rng(image["id"])
    pixels = _photograph(rng, image["height"], image["width"])
    _save(pixels, folder / image["file_name"])


def _coco_annotation(each: _Ellipse, image: int, number: int) -> dict[str, Any]:
    left, top, right, bottom = each.box
    return {
        "id": number,
        "image_id": image,
        "category_id": each.class_ + 1,
        "iscrowd": 0,
        "area": np.pi * each.half_axes[0] * each.half_axes[1],
        "bbox": [left, top, right - left, bottom - top],
        "segmentation": [each.polygon().ravel().tolist()],
    }


def write_cityscapes(root: Path, n_images: int, n_tested: int = 2) -> None:
    """Writes n_images to train on and n_tested to test on, PNGs of 2,048 x 1,024 px as the real."""
    height, width = 1024, 2048

    def write(number: int) -> None:
        rng = np.random.default_rng(number)
        split = "train" if number < n_images else "val"
        stem = f"town_{number:06d}_000019"
        # Bands from top to bottom stand for sky, buildings and road.
        bands = np.repeat(np.array([10, 2, 0], np.uint8), [height // 4, height // 4, height // 2])
        background = np.repeat(bands[:, None], width, axis=1)
        objects = _objects(rng, height, width, _CITYSCAPES_OBJECTS, len(CITYSCAPES_CLASSES))
        class_map = _class_map(objects, background, first_class=0)
        image = root / "leftImg8bit" / split / "town" / f"{stem}_leftImg8bit.png"
        _save(_photograph(rng, height, width), image)
        mask = root / "gtFine" / split / "town" / f"{stem}_gtFine_labelTrainIds.png"
        _save(class_map, mask)

    _in_threads(write, n_images + n_tested)


def _size(rng: np.random.Generator, short: int, long: int) -> tuple[int, int]:
    """Returns height and width of an image that may stand upright."""
    return (long, short) if rng.random() < _SHARE_UPRIGHT else (short, long)


def _objects(
    rng: np.random.Generator, height: int, width: int, mean: float, n_classes: int
) -> list[_Ellipse]:
    """Returns one object or more, `mean` on average, that lie inside of the image."""
    objects = []
    for _ in range(1 + rng.poisson(mean - 1)):
        # Small objects are more frequent than large ones, as in the real sets.
        half_width = width * rng.uniform(0.15, 0.65) ** 2
        half_height = height * rng.uniform(0.15, 0.65) ** 2
        center = (
            rng.uniform(half_width + 1, width - half_width - 1),
            rng.uniform(half_height + 1, height - half_height - 1),
        )
        objects.append(
            _Ellipse(
                class_=int(rng.integers(n_classes)),
                center=center,
                half_axes=(half_width, half_height),
            )
        )
    return objects


def _photograph(rng: np.random.Generator, height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
    """Returns a random part of a photograph, brought to the size, with the noise of a camera."""
    photo = read_photo(_PHOTOS[rng.integers(len(_PHOTOS))])
    # Half of the photograph's sides or more, so that little is enlarged.
    share = rng.uniform(0.5, 1)
    scale = share * min(photo.width / width, photo.height / height)
    part_width, part_height = width * scale, height * scale
    left = rng.uniform(0, photo.width - part_width)
    top = rng.uniform(0, photo.height - part_height)
    box = (left, top, left + part_width, top + part_height)
    resized = photo.resize((width, height), Image.Resampling.BICUBIC, box=box)
    # Files of enlarged photographs are too small without noise.
    noise = rng.normal(0, 2, (height, width, 3))
    return (np.asarray(resized) + noise).clip(0, 255).astype(np.uint8)


def _class_map(
    objects: Sequence[_Ellipse], background: UInt8[np.ndarray, "h w"], *, first_class: int
) -> UInt8[np.ndarray, "h w"]:
    class_map = background.copy()
    for each in objects:
        class_map[each.inside(*background.shape)] = first_class + each.class_
    return class_map


def _voc_annotation(objects: Sequence[_Ellipse], height: int, width: int) -> str:
    described = []
    for each in objects:
        # VOC counts pixels from 1.
        left, top, right, bottom = (int(side) + 1 for side in each.box)
        described.append(
            f"<object><name>{VOC_CLASSES[each.class_]}</name><difficult>0</difficult><bndbox>"
            f"<xmin>{left}</xmin><ymin>{top}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax>"
            "</bndbox></object>"
        )
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation>{size}{''.join(described)}</annotation>"


def _save(pixels: np.ndarray, path: Path, palette: list[int] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if palette:
        image.putpalette(palette)
    image.save(path, quality=_QUALITY)


def _voc_palette() -> list[int]:
    """Returns red, green and blue of each of 256 values, those of classes as in VOC."""
    colors = np.zeros((256, 3), np.uint8)
    for color, number in voc_colors().items():
        colors[number] = color
    return colors.ravel().tolist()


def _in_threads(write: Callable[[int], None], n: int) -> None:
    with ThreadPoolExecutor() as threads:
        list(threads.map(write, range(n)))
