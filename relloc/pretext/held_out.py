"""Pretext accuracy on images never trained on, with an interval that knows which images are kin."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Int
from scipy.special import stdtrit
from torch import Tensor

from relloc.pretext import objective
from relloc.pretext.loop import PAIRS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Top-1 over all pairs in percent, and a 95 % interval."""

    percent: float
    low: float
    high: float
    n_pairs: int


@torch.no_grad()
def count_hits(
    model: objective.RelativeLocation,
    batches: Iterable[Tensor],
    patches: Callable[[Tensor, torch.Generator], Tensor],
    *,
    seed: int,
    device: torch.device,
    bf16: bool,
) -> Int[Tensor, "n"]:
    """Right answers (0..8) of each image of `batches` (uint8 b 3 s s), the model in eval mode.

    The jitter and colors of batch i come from a generator seeded by `seed` alone, so that every
    checkpoint is asked the same questions.
    """
    was_training = model.training
    model.eval()
    generator = torch.Generator(device).manual_seed(seed)
    found = []
    for images in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(patches(images.to(device, non_blocking=True), generator))
        found.append(objective.hits(logits).cpu())
    model.train(was_training)
    return torch.cat(found)


def accuracy(hits: Int[Tensor, "n"], sources: Sequence[str]) -> Accuracy:
    """Accuracy with an interval over sources: images of one source count as one observation.

    The eight pairs of an image share its center, and tiles of a photograph share pixels; treating
    them as independent would promise too much. The interval is Student's t on the linearized
    variance of a ratio of cluster totals (Cochran, Sampling Techniques, 3rd ed., 6.3); it is
    0..100 where there is one source.
    """
    names, place = np.unique(np.asarray(sources), return_inverse=True)
    hits_of = np.bincount(place, weights=hits.numpy(), minlength=len(names))
    pairs_of = np.bincount(place, minlength=len(names)) * PAIRS
    share = float(hits_of.sum() / pairs_of.sum())
    half = math.inf
    if len(names) > 1:
        variance = len(names) / (len(names) - 1) * float(((hits_of - share * pairs_of) ** 2).sum())
        half = float(stdtrit(len(names) - 1, 0.975)) * math.sqrt(variance) / float(pairs_of.sum())
    return Accuracy(
        percent=100 * share,
        low=100 * max(0.0, share - half),
        high=100 * min(1.0, share + half),
        n_pairs=int(pairs_of.sum()),
    )
