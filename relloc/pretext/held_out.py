"""Held-out pretext accuracy with a 95 % confidence interval clustered by source image."""

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Int, Num
from scipy.special import stdtrit
from torch import Tensor, nn

from relloc.patches.pipeline import PatchPipeline
from relloc.pretext.questions import CENTER_PAIRS, Questions
from relloc.seeds import Use, seed_for

# The label of the position that the network predicts for each of the eight pairs of an image
PredictedPositions = Int[Tensor, "n 8"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Top-1 accuracy over all questions, with the ends of its 95 % interval; all in percent."""

    percent: float
    low: float
    high: float
    n_questions: int


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts the model into eval mode for the block, and then each module back into its own mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        # Module by module, since some may be frozen in eval mode within a model that trains.
        for module, training in modes.items():
            module.training = training


@torch.no_grad()
def answers(
    model: nn.Module,
    questions: Questions,
    batches: Iterable[Tensor],
    patches: PatchPipeline,
    *,
    seed: int,
    device: torch.device,
    bf16: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the outputs of the model in eval mode, and what is right, for each batch of images.

    `batches` are uint8 (b 3 s s), and `patches` makes patches of them. All random numbers of the
    patches come from one generator seeded by `seed` alone, so that every checkpoint gets the same
    questions.
    """
    generator = torch.Generator(device).manual_seed(seed_for(Use.HELD_OUT_PATCHES, seed))
    with evaluating(model):
        # The generator goes on from batch to batch: random numbers depend on the order of images.
        for images in batches:
            on_device = images.to(device, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                drawn = patches.draw(len(images), generator)
                outputs = model(patches.make(on_device, *drawn))
            yield outputs, questions.truth(*drawn)


def predict_positions(
    model: nn.Module,
    batches: Iterable[Tensor],
    patches: PatchPipeline,
    *,
    seed: int,
    device: torch.device,
    bf16: bool,
) -> PredictedPositions:
    """Returns the labels that the model, in eval mode, predicts for the eight pairs of each image.

    The model is asked about `CENTER_PAIRS`, so that the right label of pair i is i. The arguments
    are those of `answers`.
    """
    labels_of_batches = []
    answered = answers(model, CENTER_PAIRS, batches, patches, seed=seed, device=device, bf16=bf16)
    for logits, _ in answered:
        labels_of_batches.append(logits.argmax(dim=2).cpu())
    return torch.cat(labels_of_batches)


def count_hits(predicted: PredictedPositions) -> Int[Tensor, "n"]:
    """Returns the number of right answers (0 to 8) for each image."""
    right = torch.arange(CENTER_PAIRS.n_questions)
    return (predicted == right).sum(dim=1)


def confusion(predicted: PredictedPositions) -> Int[Tensor, "8 8"]:
    """Returns the confusion matrix: counts by true position (row) and predicted one (column)."""
    n_positions = CENTER_PAIRS.n_outputs
    true_positions = torch.arange(n_positions)
    # Each (true, predicted) pair gets a number of its own, 0 to 63, of which occurrences are
    # counted.
    cells = true_positions * n_positions + predicted
    counts = cells.flatten().bincount(minlength=n_positions * n_positions)
    return counts.reshape(n_positions, n_positions)


def accuracy(
    hits: Int[Tensor, "n"], sources: Sequence[str], *, n_questions: int = CENTER_PAIRS.n_questions
) -> Accuracy:
    """Returns the accuracy with an interval that treats images of one source as one observation.

    The questions about an image share patches, and tiles of a photograph share pixels. An
    interval that took them as independent would be too narrow. The interval is Student's t on the
    linearized variance of a ratio of cluster totals (Cochran, Sampling Techniques, 3rd ed., 6.3).
    With a single source nothing is known of others, and the interval is 0 to 100.

    Args:
        hits: number of right answers of each image, as `count_hits` gives them.
        sources: a name for each image; images with the same name are of one source.
        n_questions: how many questions each image gave.
    """
    asked_of_image = np.full(len(hits), n_questions)
    share, half_width = clustered_ratio(hits.numpy(), asked_of_image, sources)
    return Accuracy(
        percent=100 * share,
        low=100 * max(0.0, share - half_width),
        high=100 * min(1.0, share + half_width),
        n_questions=len(hits) * n_questions,
    )


def clustered_ratio(
    numerators: Num[np.ndarray, "n"],
    denominators: Num[np.ndarray, "n"],
    sources: Sequence[str],
) -> tuple[float, float]:
    """Returns a ratio of sums over images, and half the width of its 95 % interval.

    The interval is clustered by source, as that of `accuracy`; with a single source it is infinite.

    Args:
        numerators: what is summed above the line, such as right answers, for each image.
        denominators: what is summed below it, such as the number of pairs.
        sources: a name for each image; images with the same name are of one source.
    """
    names, source_of_image = np.unique(np.asarray(sources), return_inverse=True)
    n_sources = len(names)
    # Totals of each cluster
    above = np.bincount(source_of_image, weights=numerators, minlength=n_sources)
    below = np.bincount(source_of_image, weights=denominators, minlength=n_sources)
    total_below = float(below.sum())
    ratio = float(above.sum()) / total_below

    half_width = math.inf
    if n_sources > 1:
        # How far each cluster is from what the ratio expects of it; their mean square is the
        # variance of the ratio.
        residuals = above - ratio * below
        sum_of_squares = float((residuals**2).sum())
        variance = n_sources / (n_sources - 1) * sum_of_squares
        # 2.5 % on each side are left out; with many sources the quantile is the normal one, 1.96.
        t_quantile = float(stdtrit(n_sources - 1, 0.975))
        standard_error_above = math.sqrt(variance)
        half_width = t_quantile * standard_error_above / total_below
    return ratio, half_width
