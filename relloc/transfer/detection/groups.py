"""Denominators of losses, which depend on how many images a GPU of the published training has."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from relloc.to_device import on_device


def mean_over_groups(
    sums: Float[Tensor, "b"],
    counts: Shaped[Tensor, "b"],
    groups: Sequence[int],
) -> Float[Tensor, ""]:
    """Returns the mean over groups of images of (sum of losses / number of samples).

    The published trainings divide the loss of each GPU's few images by their samples, and then
    average over GPUs. So a group here is what a GPU has there, and the result depends neither on
    the number of GPUs nor on how many images pass at once, if groups stay whole. A group counts by
    the images that it has, of which some may be missing.

    Args:
        sums: sum of the losses of each image.
        counts: number of samples of each image. A group without samples is divided by 1.
        groups: number of the group of each image.
    """
    # Whether an image is of a group. Sums over it are the same in every run, which those by
    # scattered additions on a GPU are not.
    group = on_device(sorted(set(groups)), sums, torch.int64).unsqueeze(1)
    is_of_group = group == on_device(groups, sums, torch.int64)
    group_sums = torch.where(is_of_group, sums, 0).sum(dim=1)
    group_counts = torch.where(is_of_group, counts, 0).sum(dim=1)

    # Without images there are no groups, and the sum below is 0 whatever is divided by.
    weights = is_of_group.sum(dim=1) / max(len(sums), 1)
    denominators = group_counts.clamp(min=1)
    group_losses = weights * group_sums / denominators
    return group_losses.sum()
