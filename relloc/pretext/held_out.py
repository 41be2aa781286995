"""Pretext accuracy on images never trained on, with an interval that knows which images are kin."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from relloc.pretext import objective
from relloc.pretext.loop import PAIRS

_RESAMPLES = 2000


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


def accuracy(hits: Int[Tensor, "n"], sources: Sequence[str], *, seed: int) -> Accuracy:
    """Accuracy with a bootstrap interval over sources: images of one source are drawn together.

    The eight pairs of an image share its center, and tiles of a photograph share pixels; treating
    them as independent would promise too much.
    """
    names, place = np.unique(np.asarray(sources), return_inverse=True)
    hits_of = np.bincount(place, weights=hits.numpy(), minlength=len(names))
    pairs_of = np.bincount(place, minlength=len(names)) * PAIRS
    drawn = np.random.default_rng(seed).integers(len(names), size=(_RESAMPLES, len(names)))
    resampled = 100 * hits_of[drawn].sum(axis=1) / pairs_of[drawn].sum(axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Accuracy(
        percent=100 * float(hits_of.sum() / pairs_of.sum()),
        low=float(low),
        high=float(high),
        n_pairs=int(pairs_of.sum()),
    )
