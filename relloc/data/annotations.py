"""What images are annotated with: objects with boxes and masks, or the class of each pixel.

Boxes are `x1 y1 x2 y2` in continuous pixel coordinates of the original image. A mask is a list of
polygons or run lengths, as COCO writes them, and `decode_mask` gives its pixels. A class map has
the class of each pixel, and `VOID` where a pixel counts for none.
"""

import dataclasses
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64, UInt8

from relloc.data.image_set import ImageSet
from relloc.errors import UnreadableImage

VOID = 255
"""Value of the pixels of a class map that count for no class."""
# Numbers of a triangle, x y x y x y: a polygon has no fewer.
LEAST_POLYGON_NUMBERS = 6


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Polygons:
    """The outline of an object that may be in several parts: each is `x y x y …`, in pixels."""

    parts: tuple[Float64[np.ndarray, "_"], ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RunLengths:
    """A mask column by column: the lengths of runs outside, inside, outside … of the object."""

    counts: Int64[np.ndarray, "runs"]


Mask = Polygons | RunLengths


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Objects:
    """The annotated objects of one image.

    `boxes` are for training, and `xywh` the same as the annotation has them, in double precision,
    for metrics that compare overlaps to the last bit. `areas` are in square pixels: COCO's own, of
    masks, and those of boxes elsewhere. `crowd` marks a region of many objects, `difficult` one
    that is hard to recognize, and `occluded` one that others cover in part; it is None where
    annotations do not say it. `masks` is empty for sets without masks.
    """

    boxes: Float32[np.ndarray, "n 4"]
    xywh: Float64[np.ndarray, "n 4"]
    classes: Int64[np.ndarray, "n"]
    difficult: Bool[np.ndarray, "n"]
    crowd: Bool[np.ndarray, "n"]
    areas: Float64[np.ndarray, "n"]
    masks: tuple[Mask, ...] = ()
    occluded: Bool[np.ndarray, "n"] | None = None

    def __len__(self) -> int:
        return len(self.classes)


@runtime_checkable
class ObjectImages(ImageSet, Protocol):
    """An `ImageSet` each of whose images has a list of objects, which may be empty."""

    def objects(self, index: int) -> Objects:
        """Returns the objects of an image. Raises `UnreadableImage` if its annotation is wrong."""
        ...

    def count(self, index: int) -> int:
        """Returns the number of objects of an image. Raises `UnreadableImage` as `objects`."""
        ...

    def size(self, index: int) -> tuple[int, int]:
        """Returns height and width of an image in pixels, as its annotation says.

        Raises:
            UnreadableImage: the annotation is wrong.
        """
        ...

    def image_id(self, index: int) -> int:
        """Returns COCO's number of the image; in other sets its index."""
        ...

    def unusable(self) -> Mapping[int, str]:
        """Returns why annotations can't be used, by the index of the image."""
        ...


@runtime_checkable
class ProposedImages(ObjectImages, Protocol):
    """An `ObjectImages` each of whose images has boxes in which objects may be."""

    def proposals(self, index: int) -> Float32[np.ndarray, "n 4"]:
        """Returns `x1 y1 x2 y2` in pixels, counted from 0; both corners are pixels of the box."""
        ...


@runtime_checkable
class SegmentedImages(ImageSet, Protocol):
    """An `ImageSet` each of whose images has a class map."""

    def class_map(self, index: int) -> UInt8[np.ndarray, "h w"]:
        """Returns the class of each pixel, or `VOID`. Raises `UnreadableImage` if it is wrong."""
        ...


@runtime_checkable
class CheckedAnnotations(Protocol):
    """A set that can say whether the annotation of an image is what it should be."""

    def check_annotation(self, index: int, height: int, width: int) -> Mapping[str, str]:
        """Returns what is odd in the annotation of an image that has this size, in pixels.

        Keys complete the sentence "3 images have …", values say where. What is odd can be trained
        on.

        Raises:
            UnreadableImage: the image can't be used, because its annotation is missing or wrong.
        """
        ...


def decode_mask(mask: Mask, height: int, width: int) -> UInt8[np.ndarray, "{height} {width}"]:
    """Returns the pixels of a mask, 1 inside and 0 outside, equal to those of pycocotools.

    Raises:
        UnreadableImage: run lengths that do not fill the image.
    """
    if isinstance(mask, RunLengths):
        n_mask_pixels = mask.counts.sum()
        n_image_pixels = height * width
        if n_mask_pixels != n_image_pixels:
            raise UnreadableImage(f"a mask has {n_mask_pixels} pixels, its image {n_image_pixels}")
        # The first run is outside, and each one changes sides.
        run_numbers = np.arange(len(mask.counts))
        is_inside = (run_numbers % 2).astype(np.uint8)
        pixels = np.repeat(is_inside, mask.counts)
        # Runs go down the columns, from left to right.
        columns = pixels.reshape(width, height)
        return np.ascontiguousarray(columns.T)
    # Imported here, since most runs need no masks.
    from faster_coco_eval.core import mask as rasterizer

    # pycocotools fills outlines by rules of its own, which faster-coco-eval's code shares.
    parts = [part.tolist() for part in mask.parts]
    encoded_parts = rasterizer.frPyObjects(parts, height, width)
    # Parts are united: a pixel is inside if it is inside of one of them.
    united = rasterizer.merge(encoded_parts)  # pyright: ignore[reportArgumentType]
    pixels = rasterizer.decode(united)
    return np.ascontiguousarray(pixels)


def images_with_objects(images: ObjectImages, *, least_px: int = 32) -> list[int]:
    """Returns the indices of the images that detectors are trained on.

    These have at least one object, of whatever kind, and no side under `least_px` pixels
    (mmdetection's `filter_empty_gt` and `min_size`). Images whose annotation can't be used are left
    out: who calls this counts them, by `unusable`.
    """
    indices = []
    unusable = images.unusable()
    for index in range(len(images)):
        # Such an annotation has no size that could be asked for.
        if index in unusable:
            continue
        shorter_side = min(images.size(index))
        if shorter_side < least_px:
            continue
        # Crowds and difficult objects count too, as mmdetection counts them.
        if images.count(index):
            indices.append(index)
    return indices


def read_with_class_map(
    images: SegmentedImages, index: int
) -> tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w"]]:
    """Returns the RGB pixels of an image, and the class of each pixel.

    Raises:
        UnreadableImage: one of them can't be read, or their sizes differ.
    """
    rgb = images.read(index)
    class_map = images.class_map(index)
    # A mask of another size would give pixels the classes of others.
    check_same_size("its mask", class_map.shape, (rgb.height, rgb.width))
    return np.array(rgb), class_map


def check_same_size(what: str, found: tuple[int, ...], image_size: tuple[int, int]) -> None:
    """Checks a size (height, width) that an annotation has against that of its image.

    Raises:
        UnreadableImage: they differ; the message begins with `what`.
    """
    if found != image_size:
        # Messages give the width first, as programs that show images do.
        found_height, found_width = found
        height, width = image_size
        raise UnreadableImage(
            f"{what} has {found_width} x {found_height} px, the image {width} x {height} px"
        )
