"""Image files with annotations: `ObjectFolder` with objects, `ClassMapFolder` with class maps."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from relloc.data.annotations import VOID, Objects, check_same_size
from relloc.data.contents import hash_files
from relloc.data.folder import FolderImages, missing_paths, names_below_common_folder
from relloc.data.images import Undecoded, read_unconverted, size_of
from relloc.data.object_table import ObjectTable
from relloc.data.processes import Progress
from relloc.errors import DataError, UnreadableImage

# A box may reach over the border by so much before that is reported: it is rounding.
_BORDER_PX = 1.0
# mmdetection trains on no box with a side under a pixel (docs/protocols.md 3.9).
_LEAST_SIDE_PX = 1.0
# What the modes of Pillow are called in messages.
_KINDS = {
    "1": "black and white",
    "L": "gray",
    "LA": "gray with transparency",
    "P": "palette",
    "RGB": "RGB color",
    "RGBA": "RGB color with transparency",
}
# How many of the wrong values in a mask a message names.
_MOST_VALUES_NAMED = 5

# Red, green and blue, each from 0 to 255, and the class that each color stands for.
_Rgb = tuple[int, int, int]
_Palette = Mapping[_Rgb, int]
_ClassMap = UInt8[np.ndarray, "h w"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectFolder(FolderImages):
    """The images of one split as files, with their objects: `ObjectImages`.

    `ids` are the numbers that COCO gives to images; None in other sets. `reading` says which
    reference's way of reading boxes made `table`, for sets that several are defined for.
    """

    table: ObjectTable = dataclasses.field(repr=False, compare=False)
    ids: Int64[np.ndarray, "images"] | None = dataclasses.field(
        default=None, repr=False, compare=False
    )
    reading: str | None = dataclasses.field(default=None, repr=False, compare=False)

    def read(self, index: int) -> Image.Image:
        """Returns the image in RGB.

        Raises:
            UnreadableImage: its file can't be read, its annotation can't be used, or the annotation
                says another size: the boxes would then be those of another image.
        """
        # An annotation that can't be used is noticed before the image is decoded.
        size = self.size(index)
        rgb = super().read(index)
        check_same_size("its annotation", size, (rgb.height, rgb.width))
        return rgb

    def read_undecoded(self, index: int) -> Undecoded:
        """Returns the JPEG of a file undecoded, or else pixels. Raises what `read` raises."""
        size = self.size(index)
        image = super().read_undecoded(index)
        check_same_size("its annotation", size, size_of(image))
        return image

    def objects(self, index: int) -> Objects:
        return self.table.objects(index)

    def count(self, index: int) -> int:
        return len(self.table.rows(index))

    def size(self, index: int) -> tuple[int, int]:
        self.table.check_usable(index)
        height, width = self.table.sizes[index].tolist()
        return height, width

    def image_id(self, index: int) -> int:
        return index if self.ids is None else int(self.ids[index])

    def unusable(self) -> Mapping[int, str]:
        return self.table.unusable

    @property
    def n_objects(self) -> int:
        """Number of objects in all images."""
        return len(self.table.order)

    def check_annotation(self, index: int, height: int, width: int) -> Mapping[str, str]:
        rows = self.table.rows(index)
        check_same_size("its annotation", self.size(index), (height, width))
        left, top, box_width, box_height = self.table.xywh[rows].T
        # By how many pixels each box leaves the image at each border.
        right_overhang = left + box_width - width
        bottom_overhang = top + box_height - height
        overhangs = np.array([-left, -top, right_overhang, bottom_overhang])
        reaches_over = np.any(overhangs > _BORDER_PX, axis=0)
        is_empty = (box_width < _LEAST_SIDE_PX) | (box_height < _LEAST_SIDE_PX)
        kinds = {
            "a box that reaches over the border": reaches_over,
            f"a box with a side under {_LEAST_SIDE_PX:g} px": is_empty,
        }
        odd = {}
        for kind, is_odd in kinds.items():
            if is_odd.any():
                odd_rows = rows[is_odd]
                numbers = self.table.ids[odd_rows].tolist()
                named = ", ".join(map(str, numbers))
                odd[kind] = f"object {named}"
        return odd

    def other_content(self, progress: Progress) -> Iterator[str]:
        yield from super().other_content(progress)
        yield self.table.hash()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassMapFolder(FolderImages):
    """The images of one split as files, with a mask file for each: `SegmentedImages`.

    `mask_paths` are the PNG files of masks, which hold numbers of classes and `VOID`. `modes` are
    the kinds of PNG that they may be, by the names that Pillow has for them. `palette` are the
    colors of the classes, in which palette files are to show them.
    """

    mask_paths: Sequence[str]
    modes: tuple[str, ...]
    palette: _Palette = dataclasses.field(default_factory=dict, repr=False)

    def class_map(self, index: int) -> _ClassMap:
        path = Path(self.mask_paths[index])
        values = self.mask_values(index)
        _check_values(path, values, len(self.classes))
        return values

    def mask_values(self, index: int) -> _ClassMap:
        """Returns the values of a mask as they are stored.

        Raises:
            UnreadableImage: the file is missing, damaged, of another kind than `modes`, or shows
                classes in the colors of others.
        """
        path = Path(self.mask_paths[index])
        return _class_values(path, self.modes, self.palette)

    def check_annotation(self, index: int, height: int, width: int) -> Mapping[str, str]:
        class_map = self.class_map(index)
        check_same_size("its mask", class_map.shape, (height, width))
        is_void = class_map == VOID
        if is_void.all():
            path = Path(self.mask_paths[index])
            return {"no pixel of a class": path.name}
        return {}

    def other_content(self, progress: Progress) -> Iterator[str]:
        yield from super().other_content(progress)
        # Names below the common folder, so that copies in other places have the same hash.
        names = names_below_common_folder(self.mask_paths)
        yield hash_files(self.mask_paths, names, (), progress)


def require_masks(images: str, mask_paths: Sequence[str]) -> None:
    """Checks that no mask is missing, which would otherwise be noticed when it is first read.

    Held-out masks are read after the first part of a training, which may have taken hours.
    `images` is what messages call the images.

    Raises:
        DataError: masks are missing.
    """
    missing = missing_paths(mask_paths)
    if missing:
        raise DataError(
            f"{len(missing):,} of {len(mask_paths):,} masks of {images} are missing, the first is "
            f"{missing[0]}: unpack their archive again, or make them anew"
        )


def _class_values(path: Path, modes: tuple[str, ...], palette: _Palette) -> _ClassMap:
    """Returns the values of a mask file as they are stored. Raises `UnreadableImage`."""
    try:
        mask = read_unconverted(path)
    except UnreadableImage as error:
        raise UnreadableImage(f"its mask {path} {error}") from error
    # Another mode is another kind of file: colors, say, instead of numbers.
    if mask.mode not in modes:
        wanted = " or ".join(_KINDS[mode] for mode in modes)
        found = _KINDS.get(mask.mode, f"of mode {mask.mode}")
        raise UnreadableImage(
            f"its mask {path} is {found}, and should be {wanted} with the number of a class in "
            "each pixel"
        )
    # Pillow gives the numbers of a palette file, not its colors.
    values = np.array(mask)
    if mask.mode == "P":
        colors = mask.getpalette("RGB") or []
        _check_palette(path, values, colors, palette)
    return values


def _check_palette(
    path: Path,
    values: _ClassMap,
    colors: list[int],
    palette: _Palette,
) -> None:
    """Checks that a palette shows no class in the color of another.

    Programs that save palette files may sort the colors anew: the mask then looks right, but its
    numbers mean other classes.

    Raises:
        UnreadableImage: a class is shown in the color of another.
    """
    for value in np.unique(values).tolist():
        start = 3 * value
        color = colors[start : start + 3]
        # A palette may be shorter than 256 colors: the others are black.
        red, green, blue = (*color, 0, 0, 0)[:3]
        # A color that is of no class says nothing.
        expected = palette.get((red, green, blue), value)
        if expected != value:
            raise UnreadableImage(
                f"its mask {path} shows {value} in the color of {expected}: its palette was "
                "changed when it was saved again"
            )


def _check_values(path: Path, values: _ClassMap, n_classes: int) -> None:
    """Checks that a mask has only numbers of classes, and `VOID`. Raises `UnreadableImage`."""
    # Counting is quicker than np.unique, which sorts all pixels, and each training sample needs it.
    counts = np.bincount(values.ravel(), minlength=VOID + 1)
    present = np.flatnonzero(counts)
    is_wrong = (present >= n_classes) & (present != VOID)
    wrong = present[is_wrong].tolist()
    if wrong:
        named = ", ".join(map(str, wrong[:_MOST_VALUES_NAMED]))
        raise UnreadableImage(
            f"its mask {path} has the values {named}, and should have 0 to {n_classes - 1} and "
            f"{VOID}: it may be a colored mask that was turned to gray, or one of another set"
        )
