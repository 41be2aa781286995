"""Random crops on which segmentation networks train, as mmsegmentation 0.30 makes them.

An image is resized by a random ratio, cropped, flipped, changed in its colors, normalized and
padded (docs/protocols.md 3.10). The process that reads a sample draws all random numbers from its
seed and cuts the class map; pixels are computed on the device, and only those of the crop.
"""

import dataclasses
import random
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from relloc import checks
from relloc.data.annotations import VOID
from relloc.errors import UsageError
from relloc.patches.normalize import ByDataset
from relloc.to_device import bytes_to_device, to_device
from relloc.transfer.dropout import dropout_seeds
from relloc.transfer.resize import (
    Interpolation,
    Size,
    check_box,
    fitted_size,
    interpolated,
    interpolation_table,
    nearest_indices,
)
from relloc.transfer.segmentation.batch import SegmentationBatch
from relloc.transfer.segmentation.photometric import (
    ColorChange,
    PhotometricDistortion,
    distorted,
)

_CLASS_NUMBERS = 256
# `RandomCrop` of mmsegmentation 0.30 draws as often again before it keeps what it has.
_MOST_REDRAWS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class CropPlan:
    """Which part of an image a crop shows, and how its colors are changed.

    size: of the whole resized image.
    top, left: the corner of the crop in the resized image.
    flip: whether the crop is mirrored.
    color: how its colors are changed.
    """

    size: Size
    top: int
    left: int
    flip: bool
    color: ColorChange


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CropSample:
    """An image as it was decoded, the classes of its crop's pixels, and the plan of the crop.

    The classes are those of the finished crop: flipped, and padded by `VOID`. `seed` decided all of
    it, and decides the dropout of the crop.
    """

    image: UInt8[np.ndarray, "h w 3"]
    class_map: UInt8[np.ndarray, "s s"]
    plan: CropPlan
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingCrops:
    """Random crops of resized images.

    box: (long, short), the box in pixels into which an image is fitted at ratio 1.
    ratio: the range of the factor on the sides of that box (uniform).
    crop_px: rows and columns of a crop; what a smaller image lacks is padded right and below.
    most_of_one_class: a crop is drawn again, ten times at most, unless it shows two or more classes
        and its most frequent class has less than this share of its pixels, void ones left out; at
        1, the first crop is taken.
    flip: the probability of a horizontal flip.
    photometric: changes of the colors.

    Raises:
        UsageError: a setting is out of range.
    """

    box: Sequence[int]
    ratio: Sequence[float] = (0.5, 2.0)
    crop_px: int
    most_of_one_class: float = 0.75
    flip: float = 0.5
    photometric: PhotometricDistortion = dataclasses.field(default_factory=PhotometricDistortion)

    def __post_init__(self) -> None:
        check_box("augment.box", self.box)
        checks.numbers("augment.ratio", self.ratio, above=0)
        checks.one_of("the number of limits in augment.ratio", len(self.ratio), [2])
        lower, upper = self.ratio
        checks.number("augment.ratio's upper limit", upper, at_least=lower)
        # At a smaller ratio the box would have no pixels.
        least_ratio = 1 / self.box[1]
        checks.number("augment.ratio's lower limit", lower, at_least=least_ratio)
        checks.whole("augment.crop_px", self.crop_px)
        checks.number("augment.most_of_one_class", self.most_of_one_class, above=0, at_most=1)
        checks.number("augment.flip", self.flip, at_least=0, at_most=1)
        if not isinstance(self.photometric, PhotometricDistortion):
            kind = f"{PhotometricDistortion.__module__}.{PhotometricDistortion.__name__}"
            raise UsageError(
                f"augment.photometric is {self.photometric!r}: give the numbers of a "
                f"PhotometricDistortion with _target_={kind}"
            )

    def __str__(self) -> str:
        low, high = self.ratio
        long, short = self.box
        return (
            f"crops of {self.crop_px} px from images fitted into {long} x {short} px "
            f"times {low:g}..{high:g}, less than {self.most_of_one_class:g} of one class, "
            f"flip {self.flip:g}, {self.photometric}"
        )

    def sample(
        self,
        image: UInt8[np.ndarray, "h w 3"],
        class_map: UInt8[np.ndarray, "h w"],
        seed: int,
    ) -> CropSample:
        """Returns a random crop of an image, whose only source of randomness is `seed`."""
        # The order of all draws is part of the protocol: another one gives other samples.
        rng = random.Random(seed)
        height, width = class_map.shape
        ratio = rng.uniform(*self.ratio)
        # mmcv scales the box, cuts its sides to whole numbers, and fits the image after that.
        scaled_box = [int(side * ratio) for side in self.box]
        size = fitted_size(height, width, scaled_box)
        new_height, new_width = size
        # Class maps are not interpolated: there is no class between two others.
        rows = nearest_indices(height, new_height)
        columns = nearest_indices(width, new_width)

        # A class map is cut before the crop is known, as the choice depends on its classes.
        last_top = max(new_height - self.crop_px, 0)
        last_left = max(new_width - self.crop_px, 0)
        for redraw in range(_MOST_REDRAWS + 1):
            top = rng.randint(0, last_top)
            left = rng.randint(0, last_left)
            crop_rows = rows[top : top + self.crop_px]
            crop_columns = columns[left : left + self.crop_px]
            classes = class_map[crop_rows][:, crop_columns]
            if self.most_of_one_class == 1 or redraw == _MOST_REDRAWS:
                break
            if is_mixed(classes, self.most_of_one_class):
                break

        flip = rng.random() < self.flip
        if flip:
            classes = classes[:, ::-1]
        # What a small image lacks counts for no class.
        padded = np.full((self.crop_px, self.crop_px), VOID, dtype=np.uint8)
        n_rows, n_columns = classes.shape
        padded[:n_rows, :n_columns] = classes
        color = self.photometric.draw(rng)
        plan = CropPlan(size=size, top=top, left=left, flip=flip, color=color)
        return CropSample(image=image, class_map=padded, plan=plan, seed=seed)

    def batch(self, samples: Sequence[CropSample], device: torch.device) -> SegmentationBatch:
        """Returns the crops of the samples on the device; of no samples, an empty batch."""
        side = self.crop_px
        if not samples:
            return SegmentationBatch(
                images=torch.zeros(0, 3, side, side, device=device),
                class_maps=torch.zeros(0, side, side, dtype=torch.int64, device=device),
                seeds=dropout_seeds([], device),
            )
        # A single copy brings all tables to the device.
        tables_on_cpu = [self._tables(sample) for sample in samples]
        tables = to_device(torch.stack(tables_on_cpu), device)
        sources = bytes_to_device([sample.image for sample in samples], device)
        crops = []
        for pixels, (row_table, column_table) in zip(sources, tables, strict=True):
            rows = Interpolation.from_table(row_table)
            columns = Interpolation.from_table(column_table)
            crops.append(interpolated(pixels, rows, columns))
        # Crops are of one size now, so that the rest is computed for all at once.
        channels_first = torch.stack(crops).permute(0, 3, 1, 2)
        colors = [sample.plan.color for sample in samples]
        images = distorted(channels_first.contiguous(), colors)
        # Padding is black after the normalization, as the source normalizes before it pads.
        is_image = self._filled(samples, device)
        normalize = ByDataset()
        images = torch.where(is_image, normalize(images), 0)

        # Bytes on the way, and the numbers that cross-entropy takes on the device.
        class_maps = bytes_to_device([sample.class_map for sample in samples], device)
        return SegmentationBatch(
            images=images,
            class_maps=torch.stack(class_maps).long(),
            seeds=dropout_seeds([sample.seed for sample in samples], device),
        )

    def _tables(self, sample: CropSample) -> Float[Tensor, "2 3 s"]:
        """Returns the interpolation tables of a crop's rows and columns; 0 where it is padded."""
        plan = sample.plan
        source_sides = sample.image.shape[:2]
        tables = torch.zeros(2, 3, self.crop_px)
        for axis, first in enumerate((plan.top, plan.left)):
            whole_table = interpolation_table(source_sides[axis], plan.size[axis])
            end = first + self.crop_px
            table = whole_table[:, first:end]
            # To read columns backwards mirrors the crop at no cost.
            is_column = axis == 1
            if plan.flip and is_column:
                table = table.flip(1)
            n_pixels = table.shape[1]
            tables[axis, :, :n_pixels] = table
        return tables

    def _filled(
        self,
        samples: Sequence[CropSample],
        device: torch.device,
    ) -> Bool[Tensor, "b 1 s s"]:
        """Returns which pixels of each crop show its image; others are right of it or below."""
        sizes = torch.tensor([sample.plan.size for sample in samples])
        heights, widths = to_device(sizes, device).unbind(dim=1)
        places = torch.arange(self.crop_px, device=device)
        is_row = places < heights.unsqueeze(1)
        is_column = places < widths.unsqueeze(1)
        is_image = is_row.unsqueeze(2) & is_column.unsqueeze(1)
        return is_image.unsqueeze(1)


def is_mixed(class_map: UInt8[np.ndarray, "h w"], most_of_one_class: float) -> bool:
    """Returns whether a crop shows several classes, none of them too often.

    Void pixels are not counted. `most_of_one_class` is the share that no class may reach.
    """
    counts = np.bincount(class_map.ravel(), minlength=_CLASS_NUMBERS)
    counts[VOID] = 0
    shows_several = np.count_nonzero(counts) > 1
    # A crop of void alone has no share, and is not mixed either.
    if not shows_several:
        return False
    largest_share = counts.max() / counts.sum()
    return bool(largest_share < most_of_one_class)
