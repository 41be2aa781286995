"""Random choice of the anchors and regions that an image is trained on.

Each candidate has a priority that is hashed from the image's seed and the candidate's id, and the
smallest ones are taken. So the choice is the same on every device and however images are batched.
It is made by integer arithmetic on the device, which never waits for it.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from relloc.to_device import on_device
from relloc.transfer.random_bits import random_bits

# The priority of what is no candidate. No candidate has it, as bit 31 of theirs is 0.
_LARGEST = torch.iinfo(torch.int64).max

# For each candidate of each image: whether it is one, and its priority.
_Mask = Bool[Tensor, "b n"]
_Numbers = Int[Tensor, "b n"]


def priorities(seeds: Sequence[int], ids: Int[Tensor, "n"]) -> _Numbers:
    """Returns a random priority for each of `n` candidates in each of `b` images, all different.

    `seeds` are of 63 bits, one for each image. `ids` are different numbers from 0 to 2^31 - 1.
    """
    hashed = random_bits(on_device(seeds, ids, torch.int64), ids)
    # The upper bits are random, and the lower ones make all priorities of an image different, so
    # that no order among equals can depend on the device. One bit is given up for the sign.
    upper_bits = hashed >> 1
    return (upper_bits << 32) | ids


def choose(
    positive: _Mask,
    negative: _Mask,
    priority: _Numbers,
    *,
    number: int,
    positive_share: float,
) -> tuple[_Mask, _Mask]:
    """Returns which positive and which negative candidates are chosen for each image.

    Together they are `number`, or fewer where candidates are lacking. At most `positive_share` of
    `number` are positive, rounded down; negative ones fill up the rest.
    """
    most_positive = int(number * positive_share)
    n_images = len(priority)
    limit = priority.new_full((n_images,), most_positive)
    chosen_positive = _take_smallest(positive, priority, limit, most_positive)
    # Objects are rare: what they leave free of the number is background (mmdetection's
    # RandomSampler with neg_pos_ub=-1).
    n_positive = chosen_positive.sum(dim=1)
    rest = number - n_positive
    chosen_negative = _take_smallest(negative, priority, rest, number)
    return chosen_positive, chosen_negative


def _take_smallest(
    candidates: _Mask,
    priority: _Numbers,
    limits: Int[Tensor, "b"],
    most: int,
) -> _Mask:
    """Returns which candidates are among the first of their image, as many as `limits` says.

    `most` is an upper bound of the limits, known without asking the device.
    """
    ordered = priority.masked_fill(~candidates, _LARGEST)
    n_columns = min(most, candidates.shape[1])
    values, indices = ordered.topk(
        n_columns,
        dim=1,
        largest=False,
        sorted=True,
    )
    # Each image has a limit of its own, which only the device knows: as many columns are computed
    # for all images, and those behind the limit or without a candidate are masked.
    ranks = torch.arange(n_columns, device=candidates.device)
    is_within_limit = ranks < limits.unsqueeze(1)
    is_candidate = values < _LARGEST
    is_taken = is_within_limit & is_candidate
    none_taken = torch.zeros_like(candidates)
    return none_taken.scatter(1, indices, is_taken)
