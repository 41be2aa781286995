"""All named evaluations of one backbone: features computed once, numbers given their full names."""

import copy
import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from relloc import ranks
from relloc.data.image_set import ImageSet, Splits, hash_lines
from relloc.data.lists import MultiLabeled
from relloc.data.views import View
from relloc.evaluation.contract import (
    BATCH_NORMS,
    Augmenting,
    EvalSettings,
    EvaluatedModel,
    Evaluation,
    FineTuning,
    Job,
    Labels,
    check_images,
)
from relloc.features.batch_norm import recalibrate
from relloc.features.source import (
    FeatureSource,
    LiveFeatures,
    Sets,
    State,
    bank_device,
    bank_gib,
    fill_bank,
    free_gib,
    in_gib,
)
from relloc.results import Result, Score
from relloc.seeds import Use, seed_for

_CALIBRATION_VERSION = 2  # raised when other images are drawn to recalibrate batch norm on
_PRECISIONS = {"fp32": "float32", "tf32": "TF32", "bf16": "bfloat16"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """A part of a job that is finished, or stopped, as a whole; `mark` is its fingerprint."""

    job: Job
    evaluation: Evaluation | FineTuning
    batch_norm: str
    mark: str


def evaluate(
    subject: EvaluatedModel,
    jobs: Sequence[Job],
    terms: EvalSettings,
    *,
    is_done: Callable[[str, str, str], bool],
    state: Callable[[Work], State],
    unreadable: Callable[[dict[str, str]], None],
) -> Iterator[list[Result]]:
    """The rows of each evaluation under each batch norm, as they come.

    What `is_done` says of (name, batch norm, fingerprint) is left out. `state` is where a long
    evaluation keeps what it would go on from.

    Raises:
        UsageError: the data lacks the labels that are needed, or is too small.
    """
    for job in jobs:
        check_images(job)
    parts = [work for way in terms.batch_norms for job in jobs for work in works(job, way, subject, terms)]
    wanted = [work for work in parts if not is_done(work.job.name, work.batch_norm, work.mark)]
    for _, alike in itertools.groupby(sorted(wanted, key=_order), key=_shared):
        together = list(alike)
        own_terms = _terms_of(together[0].job, terms)
        yield from _evaluate_alike(subject, together, own_terms, state, unreadable)


def works(job: Job, batch_norm: str, subject: EvaluatedModel, terms: EvalSettings) -> Iterator[Work]:
    """The parts of a job: its layers, where they know nothing of each other."""
    whole = job.evaluation
    if not isinstance(whole, Evaluation):
        if batch_norm == terms.batch_norms[0]:  # it trains with the weights: there is one way only
            mark = fingerprint(whole, subject, job.splits, terms, "as_trained")
            yield Work(job=job, evaluation=whole, batch_norm="as_trained", mark=mark)
        return
    alone = [(layer,) for layer in whole.layers] if whole.layer_by_layer else [whole.layers]
    for layers in alone:
        part = dataclasses.replace(whole, layers=layers)  # pyright: ignore[reportArgumentType]
        mark = fingerprint(part, subject, job.splits, terms, batch_norm)
        yield Work(job=job, evaluation=part, batch_norm=batch_norm, mark=mark)


def _shared(work: Work) -> tuple[str, ...]:
    """Works that agree in this see the same features."""
    splits, evaluation = work.job.splits, work.evaluation
    digests = (splits.train.digest(), splits.held_out.digest())
    return work.batch_norm, *digests, str(work.job.unreadable_share), repr(evaluation.view), evaluation.labels


def _order(work: Work) -> tuple[int, tuple[str, ...]]:
    return BATCH_NORMS.index(work.batch_norm), _shared(work)


def _evaluate_alike(
    subject: EvaluatedModel,
    works: Sequence[Work],
    terms: EvalSettings,
    state: Callable[[Work], State],
    unreadable: Callable[[dict[str, str]], None],
) -> Iterator[list[Result]]:
    frozen = []
    for work in works:
        if isinstance(work.evaluation, Evaluation):
            frozen.append((work, work.evaluation))
            continue
        scores = work.evaluation(
            subject.backbone,
            work.job.splits,
            reading=terms.reading,
            seed=terms.seed,
            state=state(work),
            unreadable=unreadable,
        )
        how = ("batch-norm statistics trained with the weights",)
        yield [_named(score, work, subject, terms, how) for score in scores]
    if frozen:
        yield from _evaluate_frozen(subject, frozen, terms, state, unreadable)


def _terms_of(job: Job, terms: EvalSettings) -> EvalSettings:
    if job.unreadable_share is None:
        return terms
    setting = f"{job.data_setting}.unreadable_share"
    reading = dataclasses.replace(terms.reading, unreadable_share=job.unreadable_share, share_setting=setting)
    return dataclasses.replace(terms, reading=reading)


def _evaluate_frozen(
    subject: EvaluatedModel,
    works: Sequence[tuple[Work, Evaluation]],
    terms: EvalSettings,
    state: Callable[[Work], State],
    unreadable: Callable[[dict[str, str]], None],
) -> Iterator[list[Result]]:
    """Works that see the same features, which are therefore computed once."""
    first = works[0][0]
    splits, view = first.job.splits, first.evaluation.view
    backbone, how = subject.backbone, ()
    if first.batch_norm == "recalibrated":
        backbone = copy.deepcopy(backbone)
        used = recalibrate(backbone, calibration_batches(splits.train, view, terms))
        how = (f"batch-norm statistics re-estimated on {used} training images without labels",)
    train, held_out = (
        LiveFeatures(backbone, images, terms.reading, view, labels=_labels(images, first.evaluation.labels))
        for images in (splits.train, splits.held_out)
    )
    kept = _keep(train, held_out, [evaluation for _, evaluation in works if evaluation.keeps], terms)
    for work, evaluation in works:
        live = [train, held_out]
        given = Sets(train=train, held_out=held_out, classes=splits.train.classes, state=state(work))
        if evaluation.keeps:
            given = dataclasses.replace(given, train=kept[0], held_out=kept[1])
        if isinstance(evaluation, Augmenting) and evaluation.augment:
            views, color = evaluation.augment, evaluation.color
            live.append(LiveFeatures(backbone, splits.train, terms.reading, views, color=color, seed=terms.seed))
            given = dataclasses.replace(given, augmented=live[-1])
        scores = evaluation(given, device=terms.reading.device, seed=terms.seed)
        try:
            rows = [_named(score, work, subject, terms, how) for score in scores]
        finally:  # also where it is stopped: another run is not to go on from what saw broken images
            for source in live:
                unreadable(source.unreadable.reasons)
        yield rows


def _labels(images: ImageSet, needed: Labels) -> Int[Tensor, "n *classes"] | None:
    """The labels of a kind; zeros where none are needed, None for the images' own."""
    if needed == "presence" and isinstance(images, MultiLabeled):
        return torch.as_tensor(images.presence())
    return torch.zeros(len(images), dtype=torch.int64) if needed == "none" else None


def _keep(
    train: FeatureSource, held_out: FeatureSource, evaluations: Sequence[Evaluation], terms: EvalSettings
) -> tuple[FeatureSource, FeatureSource]:
    """The sources with the features of `evaluations` in memory, if there is room for them."""
    if ranks.world_size() > 1:  # evaluations that run in several processes divide what they keep
        return train, held_out
    layers = sorted({layer for evaluation in evaluations for layer in evaluation.layers})
    needed = bank_gib(train, layers) + bank_gib(held_out, layers)
    if not layers or needed > terms.bank_gib:
        return train, held_out
    device = bank_device(needed, terms.reading.device)
    if needed > (free := free_gib(device)):
        warnings.warn(
            f"features of {', '.join(layers)} take {in_gib(needed)}, and {in_gib(free)} of memory are free: they are "
            "not kept but computed again each time, which is slow",
            stacklevel=2,
        )
        return train, held_out
    size = terms.reading.batch
    return fill_bank(train, layers, size, device), fill_bank(held_out, layers, size, device)


def calibration_batches(images: ImageSet, view: View, terms: EvalSettings) -> Iterator[torch.Tensor]:
    """Pixels (b 3 s s), on the device, of the images that `terms` has statistics estimated on, drawn by its seed."""
    reading = terms.reading
    generator = torch.Generator().manual_seed(seed_for(Use.CALIBRATION_IMAGES, terms.seed))
    order = torch.randperm(len(images), generator=generator)
    size = min(reading.batch, len(images))
    places = order[: max(size, terms.calibration_images // size * size)].tolist()
    bad = reading.unreadable_of(len(images))
    whole = places[: len(places) // size * size]
    keys = [(place, seed_for(Use.CALIBRATION_VIEW, terms.seed, place)) for place in whole]
    for views in reading.views(images, view, keys, size):
        bad.add(views.unreadable)
        if len(views.pixels):
            yield reading.to_device(views.pixels)


def fingerprint(
    evaluation: Evaluation | FineTuning, subject: EvaluatedModel, splits: Splits, terms: EvalSettings, batch_norm: str
) -> str:
    """Hash of everything that decides an evaluation's numbers, the weights with it."""
    reading = terms.reading
    both = (splits.train, splits.held_out)
    images = [(split.name, split.split, split.digest()) for split in both]
    if evaluation.labels == "presence":
        images += [hash_lines(map(str, split.presence())) for split in both if isinstance(split, MultiLabeled)]
    calibrated = (_CALIBRATION_VERSION, terms.calibration_images, reading.batch) if batch_norm == "recalibrated" else ()
    who = (subject.weights, subject.model, batch_norm, calibrated)
    decided = (repr(evaluation), evaluation.version, who, reading.precision, images, terms.seed)
    return hash_lines([repr(decided)])


def _named(score: Score, work: Work, subject: EvaluatedModel, terms: EvalSettings, details: tuple[str, ...]) -> Result:
    """The result of a score; `details` say of all of an evaluation's scores how they were measured."""
    images = work.job.splits.train if score.on_train else work.job.splits.held_out
    measured = {name: value for name, value in vars(score).items() if name not in ("on_train", "details")}
    return Result(
        **measured,
        details=(*score.details, *details),
        eval=work.job.name,
        kind=work.evaluation.kind,
        dataset=images.name,
        split=images.split,
        seed=terms.seed,
        view=str(work.evaluation.view),
        precision=_PRECISIONS[terms.reading.precision],
        checkpoint=subject.checkpoint,
        model=subject.model,
        batch_norm=work.batch_norm,
        fingerprint=work.mark,
    )
