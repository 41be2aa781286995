"""The objects of all images of a split in a few arrays, small in memory and quick to send.

COCO's training split has 860,001 objects whose outlines have tens of millions of numbers. As Python
objects they would take gigabytes in each process that reads images; as arrays they take a few
hundred megabytes, which forked processes share.
"""

import dataclasses
import hashlib
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float64, Int, Int64, Num

from relloc.data.annotations import Mask, Objects, Polygons, RunLengths
from relloc.errors import UnreadableImage

# Coordinates of COCO have two decimals: as whole hundredths they take half the memory.
_HUNDREDTHS = 100
# How many numbers are converted at once, to bound the memory for intermediate results.
_CHUNK = 1 << 20

# For each object of a split: whether something holds.
_Mask = Bool[np.ndarray, "objects"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class MaskTable:
    """The masks of all objects.

    Mask `i` has the parts `part_starts[i]` to `part_starts[i + 1]`, and part `k` the numbers
    `number_starts[k]` to `number_starts[k + 1]`: coordinates of a polygon or, where
    `is_run_lengths`, run lengths. `numbers` are hundredths if they are integers.
    """

    numbers: Num[np.ndarray, "numbers"]
    number_starts: Int64[np.ndarray, "part_bounds"]
    part_starts: Int64[np.ndarray, "mask_bounds"]
    is_run_lengths: Bool[np.ndarray, "masks"]

    def mask(self, row: int) -> Mask:
        """Returns one mask."""
        first_part = self.part_starts[row]
        end_of_parts = self.part_starts[row + 1]
        parts = []
        for part in range(first_part, end_of_parts):
            start = self.number_starts[part]
            end = self.number_starts[part + 1]
            numbers = self.numbers[start:end]
            if numbers.dtype != np.float64:
                # Dividing whole hundredths gives the same bits as reading the decimal number.
                numbers = numbers / _HUNDREDTHS
            parts.append(numbers)
        # Run lengths are a single part.
        if self.is_run_lengths[row]:
            (counts,) = parts
            return RunLengths(counts=counts.astype(np.int64))
        return Polygons(parts=tuple(parts))


def in_hundredths(numbers: Float64[np.ndarray, "n"]) -> Num[np.ndarray, "n"]:
    """Returns numbers as whole hundredths in 32 bits or, if that would change one, unchanged."""
    # 32 bits reach to coordinates of 21 million pixels.
    hundredths = np.empty(len(numbers), np.int32)
    largest = np.iinfo(np.int32).max
    for start in range(0, len(numbers), _CHUNK):
        end = start + _CHUNK
        chunk = numbers[start:end]
        rounded = np.rint(chunk * _HUNDREDTHS)
        # What `MaskTable.mask` will compute of it has to be the same number.
        gives_same = rounded / _HUNDREDTHS == chunk
        fits = np.abs(rounded) <= largest
        is_exact = gives_same & fits
        if not is_exact.all():
            return numbers
        hundredths[start:end] = rounded
    return hundredths


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ObjectTable:
    """The objects of a split: those of image `i` are the rows `order[starts[i] : starts[i + 1]]`.

    `sizes` are height and width of each image in pixels; 0 where the annotation does not say.
    `ids` name an object in messages: its number in COCO, or its place in the file of its image.
    `occluded` is None where annotations do not say it. `unusable` says why the annotation of an
    image can't be used, by the number of the image.
    """

    sizes: Int64[np.ndarray, "images 2"]
    starts: Int64[np.ndarray, "image_bounds"]
    order: Int64[np.ndarray, "objects"]
    ids: Int64[np.ndarray, "objects"]
    xywh: Float64[np.ndarray, "objects 4"]
    classes: Int[np.ndarray, "objects"]
    difficult: _Mask
    crowd: _Mask
    areas: Float64[np.ndarray, "objects"]
    unusable: Mapping[int, str]
    masks: MaskTable | None = None
    occluded: _Mask | None = None

    def rows(self, index: int) -> Int64[np.ndarray, "n"]:
        """Returns the rows of the objects of an image.

        Raises:
            UnreadableImage: the annotation of the image can't be used.
        """
        self.check_usable(index)
        start = self.starts[index]
        end = self.starts[index + 1]
        return self.order[start:end]

    def check_usable(self, index: int) -> None:
        """Raises `UnreadableImage` if the annotation of an image can't be used."""
        if index in self.unusable:
            raise UnreadableImage(self.unusable[index])

    def objects(self, index: int) -> Objects:
        """Returns the objects of an image, in the order of the annotation.

        Raises:
            UnreadableImage: the annotation of the image can't be used.
        """
        rows = self.rows(index)
        # Corners are computed in double precision, and rounded once.
        xywh = self.xywh[rows]
        top_left = xywh[:, :2]
        sides = xywh[:, 2:]
        corners = np.concatenate([top_left, top_left + sides], axis=1)

        masks: list[Mask] = []
        if self.masks is not None:
            masks = [self.masks.mask(row) for row in rows.tolist()]
        return Objects(
            boxes=corners.astype(np.float32),
            xywh=xywh,
            classes=self.classes[rows].astype(np.int64),
            difficult=self.difficult[rows],
            crowd=self.crowd[rows],
            areas=self.areas[rows],
            masks=tuple(masks),
            occluded=None if self.occluded is None else self.occluded[rows],
        )

    def hash(self) -> str:
        """Returns a hash of all that detectors are trained on or tested against.

        `occluded` is left out, since results on disk have hashes that were made without it.
        """
        hasher = hashlib.sha256(b"objects of images\0")
        # The order of the arrays decides the hash, which results on disk have.
        arrays = [
            self.sizes,
            self.starts,
            self.order,
            self.ids,
            self.xywh,
            self.classes,
            self.difficult,
            self.crowd,
            self.areas,
        ]
        if self.masks is not None:
            arrays.append(self.masks.numbers)
            arrays.append(self.masks.number_starts)
            arrays.append(self.masks.part_starts)
            arrays.append(self.masks.is_run_lengths)
        for array in arrays:
            # Type and shape come first, so that two different tables never have the same bytes.
            header = f"{array.dtype.str} {array.shape}\0"
            hasher.update(header.encode())
            content = np.ascontiguousarray(array)
            hasher.update(content.data)
        # Which images can't be used counts, but not why: reasons name folders of this machine.
        unusable_indices = repr(sorted(self.unusable))
        hasher.update(unusable_indices.encode())
        return hasher.hexdigest()


def boxes_outside(
    sizes: Int64[np.ndarray, "n 2"],
    xywh: Float64[np.ndarray, "n 4"],
) -> Int64[np.ndarray, "m"]:
    """Returns the indices of boxes that no pixel of their image is in.

    `sizes` are height and width of the image of each box. A box that touches the image is in it,
    also one without extent.
    """
    height, width = sizes.T
    left, top, box_width, box_height = xywh.T
    right = left + box_width
    bottom = top + box_height
    # The first column behind the image has the number `width`.
    is_right_of_it = left >= width
    is_below_it = top >= height
    is_left_of_it = right < 0
    is_above_it = bottom < 0
    is_outside = is_right_of_it | is_below_it | is_left_of_it | is_above_it
    return np.flatnonzero(is_outside)
