"""Patches of images as unit vectors in memory, whose products are normalized correlations.

They are one matrix for each layer, made for searches (`relloc.features.nearest`).

Example:
    >>> boxes = RandomSquares(n=20, sides_px=(96,))  # worker processes call it for each image
    >>> keys = patch_keys(range(len(images)), context.seed)
    >>> encoder = PatchEncoder(
    ...     backbone=context.backbone, layers=("embedding",), patch_px=96, batch=256,
    ...     config=context.encode_config,
    ... )
    >>> patches = collect_patches(encoder, images, keys, boxes, what="patches")
    >>> vectors = patches.vectors["embedding"]  # (n d): products of rows are correlations
    >>> image, box = patches.images[7], patches.boxes[7]  # where patch 7 lies
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from relloc.data.image_set import ImageSet
from relloc.errors import DataError, UsageError
from relloc.features.bank import bank_device, format_gib, free_gib
from relloc.features.source import SeededIndex
from relloc.studies.patch_encoding import PatchEncoder, encode_patches, patch_dims
from relloc.studies.patch_sets import MakeBoxes
from relloc.terminal import quantity

_MIN_NORM = 1e-12  # shorter vectors do not get unit length, as in torch.nn.functional.normalize
_GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CollectedPatches:
    """All patches of some images, in the order of images and boxes: one matrix for each layer.

    A row of `vectors` is the feature vector of a patch minus the mean of its own components, scaled
    to length one. So the product of two rows is the normalized correlation of two patches
    (Pearson's, over components), from -1 to 1. A vector of equal components, as of a dead layer,
    is stored as zeros and correlates with nothing.

    `images` and `boxes` are on the CPU; `vectors` are where they fitted, on the device or the CPU.
    """

    vectors: dict[str, Float[Tensor, "n _d"]]
    images: Int64[Tensor, "n"]
    boxes: Int64[Tensor, "n 4"]

    def __len__(self) -> int:
        return len(self.images)


def collect_patches(
    encoder: PatchEncoder,
    images: ImageSet,
    keys: Sequence[SeededIndex],
    make_boxes: MakeBoxes,
    *,
    what: str,
    dtype: torch.dtype = torch.float16,
) -> CollectedPatches:
    """Encodes patches as `encode_patches` does, and keeps their unit vectors in memory.

    Memory is allocated once, for `make_boxes.most` patches of each image: on the device if less
    than half of what is free there suffices, otherwise on the CPU. In float16 a million patches of
    4,096 components take 7.6 GiB; correlations are then off by about 1e-5,
    of vectors of few components by up to 5e-4.

    Raises:
        UsageError: the memory is too small for all patches.
        DataError: there is no patch at all, or too many images can't be read.
    """
    dims = patch_dims(encoder.backbone, encoder.layers)
    most = len(keys) * make_boxes.most
    values_per_patch = sum(dims.values())
    needed_gib = most * values_per_patch * dtype.itemsize / _GIB
    device = bank_device(needed_gib, encoder.config.device)
    available_gib = free_gib(device)
    if needed_gib > available_gib:
        raise UsageError(
            f"{most:,} patches at {', '.join(dims)} take {format_gib(needed_gib)}, but the "
            f"memory of {device} has only {format_gib(available_gib)} free: give fewer images, "
            "fewer patches of each or fewer layers, or free memory"
        )
    vectors = {}
    for layer, dim in dims.items():
        vectors[layer] = torch.empty(most, dim, dtype=dtype, device=device)
    image_parts = []
    box_parts = []
    n_filled = 0
    for part in encode_patches(encoder, images, keys, make_boxes, what=what):
        end = n_filled + len(part.images)
        for layer, rows in vectors.items():
            # Rounded on the device, so that less is copied where they are kept on the CPU.
            rows[n_filled:end] = unit_vectors(part.features[layer]).to(dtype)
        image_parts.append(part.images)
        box_parts.append(part.boxes)
        n_filled = end
    if not n_filled:
        raise DataError(
            f"none of {quantity(len(keys), 'image')} of {images.name} {images.split} has a patch: "
            "none could be read, or all are smaller than the patches. Give smaller patches, or "
            "other images"
        )
    # Small or unreadable images leave rows at the end unused.
    return CollectedPatches(
        vectors={layer: rows[:n_filled] for layer, rows in vectors.items()},
        images=torch.from_numpy(np.concatenate(image_parts)),
        boxes=torch.from_numpy(np.concatenate(box_parts)),
    )


def unit_vectors(features: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Returns vectors less the mean of their own components, at length one.

    The product of two of them is the normalized correlation of the two feature vectors. Vectors of
    equal components become zeros.
    """
    centered = features - features.mean(dim=1, keepdim=True)
    norms = torch.linalg.vector_norm(centered, dim=1, keepdim=True)
    # What is left of equal components is the rounding of their mean, and no direction.
    sizes = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    rounding = 4 * torch.finfo(features.dtype).eps * sizes
    is_flat = norms <= rounding
    return torch.where(is_flat, 0, centered / norms.clamp(min=_MIN_NORM))
