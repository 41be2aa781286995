"""All named evaluations of one backbone: features computed once, numbers given their full names."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch

from relloc.data.image_set import ImageSet, Splits, hash_lines
from relloc.data.loader import Unreadable
from relloc.errors import UsageError
from relloc.features.batch_norm import recalibrate
from relloc.features.source import FeatureSource, LiveFeatures, Reading, bank_device, bank_gib, fill_bank
from relloc.models.backbone import Backbone
from relloc.results import Result, Score

BATCH_NORMS = ("as_trained", "recalibrated")


@runtime_checkable
class Evaluation(Protocol):
    """What evals/ members are: constants, and a call that yields scores."""

    layers: Sequence[str]

    def __call__(
        self, train: FeatureSource, held_out: FeatureSource, *, device: torch.device, seed: int
    ) -> Iterator[Score]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """Who is evaluated: a backbone in eval mode and on its device, and the names its rows carry."""

    backbone: Backbone
    checkpoint: str
    model: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Terms:
    """How evaluations are run; `bank_gib` bounds the features kept in memory."""

    reading: Reading
    batch_norms: Sequence[str]
    calibration_images: int
    bank_gib: float
    seed: int

    def __post_init__(self) -> None:
        for way in self.batch_norms:
            if way not in BATCH_NORMS:
                raise UsageError(f"batch_norm={way} is not one of {', '.join(BATCH_NORMS)}")


def evaluate(
    subject: Subject,
    splits: Splits,
    evaluations: Mapping[str, Evaluation],
    terms: Terms,
    *,
    is_done: Callable[[str, str, str], bool],
    unreadable: Callable[[dict[str, str]], None],
) -> Iterator[list[Result]]:
    """The rows of each evaluation under each batch norm, as they come.

    What `is_done` says of (name, batch norm, fingerprint) is left out.

    Raises:
        UsageError: the data has no labels.
    """
    if not splits.labeled:
        raise UsageError(
            f"{splits.train.name} has no labels to evaluate on (train/CLASS and val/CLASS folders with the same "
            "classes): evaluate on labeled data with python -m relloc.evaluate checkpoint=… data=… "
        )
    for batch_norm in terms.batch_norms:
        wanted = {
            name: run
            for name, run in evaluations.items()
            if not is_done(name, batch_norm, fingerprint(run, subject, splits, terms))
        }
        if wanted:
            yield from _evaluate_one_way(subject, splits, wanted, terms, batch_norm, unreadable)


def _evaluate_one_way(
    subject: Subject,
    splits: Splits,
    evaluations: Mapping[str, Evaluation],
    terms: Terms,
    batch_norm: str,
    unreadable: Callable[[dict[str, str]], None],
) -> Iterator[list[Result]]:
    backbone = subject.backbone
    how = "statistics as trained"
    if batch_norm == "recalibrated":
        backbone = copy.deepcopy(backbone)
        used = recalibrate(backbone, _calibration_batches(splits.train, terms))
        how = f"statistics re-estimated on {used} training images without labels"
    train, held_out = (LiveFeatures(backbone, images, terms.reading) for images in (splits.train, splits.held_out))
    kept_train, kept_held_out = _keep(train, held_out, evaluations, terms)
    for name, evaluation in evaluations.items():
        scores = evaluation(kept_train, kept_held_out, device=terms.reading.device, seed=terms.seed)
        mark = fingerprint(evaluation, subject, splits, terms)
        yield [_named(score, name, subject, splits.held_out, terms, batch_norm, how, mark) for score in scores]
        unreadable(train.unreadable.reasons | held_out.unreadable.reasons)


def _keep(
    train: FeatureSource, held_out: FeatureSource, evaluations: Mapping[str, Evaluation], terms: Terms
) -> tuple[FeatureSource, FeatureSource]:
    """The sources with all features in memory, if there is room for them."""
    layers = sorted({layer for evaluation in evaluations.values() for layer in evaluation.layers})
    needed = bank_gib(train, layers) + bank_gib(held_out, layers)
    if needed > terms.bank_gib:
        return train, held_out
    device = bank_device(needed, terms.reading.device)
    size = terms.reading.batch
    return fill_bank(train, layers, size, device), fill_bank(held_out, layers, size, device)


def _calibration_batches(images: ImageSet, terms: Terms) -> Iterator[torch.Tensor]:
    reading = terms.reading
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(terms.seed))
    size = min(reading.batch, len(images))
    places = order[: max(size, terms.calibration_images // size * size)].tolist()
    bad = Unreadable(n_images=len(images), most_share=reading.unreadable_share)
    for views in reading.views(images, places[: len(places) // size * size], size):
        bad.add(views.unreadable)
        if len(views.pixels):
            yield reading.to_device(views.pixels)


def fingerprint(evaluation: Evaluation, subject: Subject, splits: Splits, terms: Terms) -> str:
    """Hash of everything that decides an evaluation's numbers, given the weights."""
    reading = terms.reading
    view = (reading.short_px, reading.crop_px, reading.bf16)
    images = (splits.train.digest(), splits.held_out.digest())
    decided = (repr(evaluation), subject.model, view, images, terms.calibration_images, reading.batch, terms.seed)
    return hash_lines([repr(decided)])


def _named(
    score: Score,
    name: str,
    subject: Subject,
    images: ImageSet,
    terms: Terms,
    batch_norm: str,
    how: str,
    mark: str,
) -> Result:
    reading = terms.reading
    seen = f"view {reading.short_px}/{reading.crop_px} px, {'bfloat16' if reading.bf16 else 'float32'}"
    return Result(
        eval=name,
        dataset=images.name,
        split=images.split,
        layer=score.layer,
        metric=score.metric,
        value=score.value,
        n=score.n,
        seed=terms.seed,
        protocol=f"{score.protocol}; {seen}; batch norm: {how}",
        checkpoint=subject.checkpoint,
        model=subject.model,
        batch_norm=batch_norm,
        fingerprint=mark,
    )
