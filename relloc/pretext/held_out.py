"""Held-out pretext accuracy with a 95 % confidence interval clustered by source image."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Int
from scipy.special import stdtrit
from torch import Tensor, nn

from relloc.geometry import NEIGHBORS
from relloc.pretext import objective
from relloc.seeds import Use, seed_for

Answers = Int[Tensor, "n 8"]  # for each image, a label a pair
PAIRS = len(NEIGHBORS)
# Where a neighbor lies, in the order of the labels
POSITIONS = ("up_left", "up", "up_right", "left", "right", "down_left", "down", "down_right")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Top-1 over all pairs in percent, and a 95 % interval."""

    percent: float
    low: float
    high: float
    n_pairs: int


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode while the block runs; each module's own mode is put back after."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@torch.no_grad()
def answers(
    model: objective.RelativeLocation,
    batches: Iterable[Tensor],
    patches: Callable[[Tensor, torch.Generator], Tensor],
    *,
    seed: int,
    device: torch.device,
    bf16: bool,
) -> Answers:
    """The answers of the model in eval mode for each image of `batches` (uint8 b 3 s s): a label a pair.

    Pair i of an image has label i. The jitter and colors of batch i come from a generator seeded
    by `seed` alone, so that every checkpoint is asked the same questions.
    """
    generator = torch.Generator(device).manual_seed(seed_for(Use.HELD_OUT_PATCHES, seed))
    answered = []
    with evaluating(model):
        for images in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = model(patches(images.to(device, non_blocking=True), generator))
            answered.append(logits.argmax(dim=2).cpu())
    return torch.cat(answered)


def count_hits(answered: Answers) -> Int[Tensor, "n"]:
    """Right answers (0..8) of each image."""
    return (answered == torch.arange(PAIRS)).sum(dim=1)


def confusion(answered: Answers) -> Int[Tensor, "8 8"]:
    """How often a neighbor at one position (row) was taken for one at another (column)."""
    cells = torch.arange(PAIRS) * PAIRS + answered
    return cells.flatten().bincount(minlength=PAIRS * PAIRS).reshape(PAIRS, PAIRS)


def accuracy(hits: Int[Tensor, "n"], sources: Sequence[str]) -> Accuracy:
    """Accuracy with an interval over sources: images of one source count as one observation.

    The eight pairs of an image share its center, and tiles of a photograph share pixels; treating
    them as independent would promise too much. The interval is Student's t on the linearized
    variance of a ratio of cluster totals (Cochran, Sampling Techniques, 3rd ed., 6.3); it is
    0..100 where there is one source.
    """
    names, source_of = np.unique(np.asarray(sources), return_inverse=True)
    hits_of = np.bincount(source_of, weights=hits.numpy(), minlength=len(names))
    pairs_of = np.bincount(source_of, minlength=len(names)) * PAIRS
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
