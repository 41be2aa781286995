"""Random choice of the anchors and regions that an image is trained on.

Each candidate has a priority that is hashed from the image's seed and the candidate's id, and the
smallest ones are taken. So the choice is the same on every device and however images are batched.
It is made by integer arithmetic on the device, which never waits for it.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from relloc.transfer.detection.batch import on_device

_32_BITS = (1 << 32) - 1
_LARGEST = torch.iinfo(torch.int64).max


def priorities(seeds: Sequence[int], ids: Int[Tensor, "n"]) -> Int[Tensor, "b n"]:
    """Returns a random priority for each of `n` candidates in each of `b` images, all different.

    `seeds` are of 63 bits, one for each image. `ids` are different numbers from 0 to 2^31 - 1.
    """
    seed = on_device(seeds, ids, torch.int64).unsqueeze(1)
    hashed = _mix(ids ^ (seed & _32_BITS))
    hashed = _mix(hashed ^ (seed >> 32))
    # The upper bits are random, and the lower ones make all priorities of an image different, so
    # that no order among equals can depend on the device.
    return ((hashed >> 1) << 32) | ids


def _mix(x: Int[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """Returns 32-bit numbers hashed into 32-bit numbers.

    Two rounds of shift, xor and multiply, with constants from C. Wellons's hash-prospector. The
    factors are below 2^31, so no product leaves the signed 64-bit integers that torch computes in.
    """
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & _32_BITS
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & _32_BITS
    return x ^ (x >> 15)


def choose(
    positive: Bool[Tensor, "b n"],
    negative: Bool[Tensor, "b n"],
    priority: Int[Tensor, "b n"],
    *,
    number: int,
    positive_share: float,
) -> tuple[Bool[Tensor, "b n"], Bool[Tensor, "b n"]]:
    """Returns which positive and which negative candidates are chosen for each image.

    Together they are `number`, or fewer where candidates are lacking. At most `positive_share` of
    `number` are positive, rounded down; negative ones fill up the rest.
    """
    most_positive = int(number * positive_share)
    limit = priority.new_full((len(priority),), most_positive)
    chosen_positive = _take_smallest(positive, priority, limit, most_positive)
    rest = number - chosen_positive.sum(dim=1)
    chosen_negative = _take_smallest(negative, priority, rest, number)
    return chosen_positive, chosen_negative


def _take_smallest(
    candidates: Bool[Tensor, "b n"],
    priority: Int[Tensor, "b n"],
    limits: Int[Tensor, "b"],
    most: int,
) -> Bool[Tensor, "b n"]:
    """Returns which candidates are among the first of their image, as many as `limits` says.

    `most` is an upper bound of the limits, known without asking the device.
    """
    ordered = priority.masked_fill(~candidates, _LARGEST)
    n_taken = min(most, candidates.shape[1])
    values, places = ordered.topk(n_taken, dim=1, largest=False, sorted=True)
    ranks = torch.arange(n_taken, device=candidates.device)
    is_taken = (ranks < limits.unsqueeze(1)) & (values < _LARGEST)
    return torch.zeros_like(candidates).scatter(1, places, is_taken)
