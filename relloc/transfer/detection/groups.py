"""Denominators of losses, which depend on how many images a GPU of the published training has."""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn.functional import pad


def mean_over_groups(
    sums: Float[Tensor, "b"],
    counts: Shaped[Tensor, "b"],
    images_per_group: int,
) -> Float[Tensor, ""]:
    """Returns the mean over groups of consecutive images of (sum of losses / number of samples).

    The published trainings divide the loss of each GPU's few images by their samples, and then
    average over GPUs. So a group here is what a GPU has there, and the result depends neither on
    the number of GPUs nor on how many images pass at once, if groups stay whole. A last group with
    fewer images counts in proportion to them.

    Args:
        sums: sum of the losses of each image.
        counts: number of samples of each image. A group without samples is divided by 1.
        images_per_group: images of a group.
    """
    n_images = len(sums)
    # Images of zero loss and no samples fill up the last group, so that groups are rows.
    n_missing = -n_images % images_per_group
    padded_sums = pad(sums, (0, n_missing))
    padded_counts = pad(counts, (0, n_missing))
    sums_by_group = padded_sums.view(-1, images_per_group)
    counts_by_group = padded_counts.view(-1, images_per_group)
    group_sums = sums_by_group.sum(dim=1)
    group_counts = counts_by_group.sum(dim=1)

    # A group counts by its real images.
    starts = torch.arange(0, n_images, images_per_group, device=sums.device)
    images_left = n_images - starts
    images = images_left.clamp(max=images_per_group)
    # Without images there are no groups, and the sum below is 0 whatever is divided by.
    weights = images / max(n_images, 1)
    denominators = group_counts.clamp(min=1)
    group_losses = weights * group_sums / denominators
    return group_losses.sum()
