"""All named evaluations of one backbone: features computed once, numbers given their full names."""

import copy
import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from relloc import ranks
from relloc.data.image_set import ImageSet, Splits, hash_lines
from relloc.data.lists import MultiLabeled
from relloc.data.views import View
from relloc.evaluation.contract import (
    BATCH_NORMS,
    Context,
    EvalSettings,
    EvaluatedModel,
    Evaluation,
    Labels,
    NamedEvaluation,
    State,
)
from relloc.features.batch_norm import recalibrate
from relloc.features.source import (
    Bank,
    FeatureSource,
    LiveFeatures,
    bank_device,
    bank_gib,
    fill_bank,
    free_gib,
    in_gib,
)
from relloc.results import Result, Score
from relloc.seeds import Use, seed_for

_CALIBRATION_VERSION = 2  # raised when other images are drawn to recalibrate batch norm on
NO_FEATURES = Bank(features={}, labels=torch.zeros(0, dtype=torch.int64), n_classes=0, channels={})
_PRECISIONS = {"fp32": "float32", "tf32": "TF32", "bf16": "bfloat16"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalPart:
    """The part of an evaluation of a model that is finished, or stopped, as a whole.

    `evaluation` is that of `named`, or the same with one of its layers.
    """

    named: NamedEvaluation
    evaluation: Evaluation
    batch_norm: str
    fingerprint: str

    @property
    def folder(self) -> Path:
        """Where its pictures and tables go, in the run folder."""
        return Path("evaluations") / f"{self.named.name}_{self.fingerprint}"


def parts_of(named: NamedEvaluation, batch_norm: str, model: EvaluatedModel, settings: EvalSettings) -> list[EvalPart]:
    """The parts of an evaluation under a batch norm: one for each layer where these are independent."""
    evaluation = named.evaluation
    if evaluation.kind == "fine-tuned":
        if batch_norm != settings.batch_norms[0]:
            return []  # batch norm is trained with the weights: there is one way only
        batch_norm = "as_trained"
    parts = [evaluation]
    if evaluation.independent_layers:
        parts = [dataclasses.replace(evaluation, layers=(layer,)) for layer in evaluation.layers]  # pyright: ignore
    return [
        EvalPart(
            named=named,
            evaluation=part,
            batch_norm=batch_norm,
            fingerprint=fingerprint(part, model, named.splits, settings, batch_norm),
        )
        for part in parts
    ]


def fingerprint(
    evaluation: Evaluation, model: EvaluatedModel, splits: Splits, settings: EvalSettings, batch_norm: str
) -> str:
    """Hash of everything that decides an evaluation's numbers, the weights with it."""
    both = (splits.train, splits.held_out)
    images = [(split.name, split.split, split.digest()) for split in both]
    if evaluation.labels == "presence":
        images += [hash_lines(map(str, split.presence())) for split in both if isinstance(split, MultiLabeled)]
    calibrated = ()
    if batch_norm == "recalibrated":
        calibrated = (_CALIBRATION_VERSION, settings.calibration_images, settings.encode_config.batch)
    weights = (model.weights, model.model, batch_norm, calibrated)
    precision = settings.encode_config.precision
    return hash_lines([repr((repr(evaluation), evaluation.version, weights, precision, images, settings.seed))])


def grouped(parts: Sequence[EvalPart]) -> list[list[EvalPart]]:
    """The parts in the order in which they are measured; those of a group see the same features, or none."""
    order = sorted(parts, key=lambda part: (BATCH_NORMS.index(part.batch_norm), *_same_features(part)))
    return [list(group) for _, group in itertools.groupby(order, key=_same_features)]


def evaluate(
    model: EvaluatedModel,
    parts: Sequence[EvalPart],
    settings: EvalSettings,
    *,
    run_dir: Path,
    open_state: Callable[[str], State],
) -> Iterator[tuple[EvalPart, list[Result]]]:
    """Each part of a group and its results, as they come; what they share is computed once.

    `open_state` gives what a part with that fingerprint goes on from.
    """
    first = parts[0].evaluation
    splits = parts[0].named.splits
    share = parts[0].named.unreadable_share
    if share is not None:  # of images that the evaluation brings another share than of the run's may be unreadable
        setting = f"{parts[0].named.data_setting}.unreadable_share"
        own = dataclasses.replace(settings.encode_config, unreadable_share=share, share_setting=setting)
        settings = dataclasses.replace(settings, encode_config=own)
    backbone, details = model.backbone, ()
    if first.kind == "fine-tuned":
        details = ("batch-norm statistics trained with the weights",)
    elif parts[0].batch_norm == "recalibrated":
        backbone = copy.deepcopy(backbone)
        n_images = recalibrate(backbone, calibration_batches(splits.train, first.view, settings))
        details = (f"batch-norm statistics re-estimated on {n_images} training images without labels",)
    train = held_out = kept_train = kept_held_out = NO_FEATURES
    if first.layers:
        # Nothing is read or computed until an evaluation asks for features.
        train, held_out = (
            LiveFeatures(backbone, images, settings.encode_config, first.view, labels=_labels(images, first.labels))
            for images in (splits.train, splits.held_out)
        )
        kept_train, kept_held_out = _keep(train, held_out, parts, settings)
    for part in parts:
        keeps = part.evaluation.keeps_features
        context = Context(
            backbone=backbone,
            splits=part.named.splits,
            train=kept_train if keeps else train,
            held_out=kept_held_out if keeps else held_out,
            encode_config=settings.encode_config,
            seed=settings.seed,
            state=open_state(part.fingerprint),
            folder=run_dir / part.folder,
        )
        yield part, [_result(score, part, model, settings, details) for score in part.evaluation.run(context)]


def _same_features(part: EvalPart) -> tuple[str, ...]:
    """Parts that agree in this see the same features, or none. What trains comes before features fill the memory."""
    splits, evaluation = part.named.splits, part.evaluation
    kind = "" if evaluation.kind == "fine-tuned" else f"layers {bool(evaluation.layers)}"
    digests = (splits.train.digest(), splits.held_out.digest())
    return part.batch_norm, kind, *digests, str(part.named.unreadable_share), repr(evaluation.view), evaluation.labels


def _labels(images: ImageSet, needed: Labels) -> Int[Tensor, "n *classes"] | None:
    """The labels that go with features: None for the images' own class, zeros where features need none."""
    if needed == "presence" and isinstance(images, MultiLabeled):
        return torch.as_tensor(images.presence())
    return None if needed == "class" else torch.zeros(len(images), dtype=torch.int64)


def _keep(
    train: FeatureSource, held_out: FeatureSource, parts: Sequence[EvalPart], settings: EvalSettings
) -> tuple[FeatureSource, FeatureSource]:
    """The sources with the features that several of `parts` read in memory, if there is room for them."""
    if ranks.world_size() > 1:  # evaluations that run in several processes divide what they keep
        return train, held_out
    layers = sorted({layer for part in parts if part.evaluation.keeps_features for layer in part.evaluation.layers})
    needed = bank_gib(train, layers) + bank_gib(held_out, layers)
    if not layers or needed > settings.bank_gib:
        return train, held_out
    device = bank_device(needed, settings.encode_config.device)
    if needed > (free := free_gib(device)):
        warnings.warn(
            f"features of {', '.join(layers)} take {in_gib(needed)}, and {in_gib(free)} of memory are free: they are "
            "not kept but computed again each time, which is slow",
            stacklevel=2,
        )
        return train, held_out
    size = settings.encode_config.batch
    return fill_bank(train, layers, size, device), fill_bank(held_out, layers, size, device)


def calibration_batches(images: ImageSet, view: View, settings: EvalSettings) -> Iterator[torch.Tensor]:
    """Pixels (b 3 s s), on the device, of the images that statistics are estimated on, drawn by the seed."""
    encode_config = settings.encode_config
    generator = torch.Generator().manual_seed(seed_for(Use.CALIBRATION_IMAGES, settings.seed))
    order = torch.randperm(len(images), generator=generator)
    # Whole batches only: each counts alike in the statistics, whatever its size.
    size = min(encode_config.batch, len(images))
    n_images = max(size, min(settings.calibration_images, len(images)) // size * size)
    indices = order[:n_images].tolist()
    keys = [(index, seed_for(Use.CALIBRATION_VIEW, settings.seed, index)) for index in indices]
    unreadable = encode_config.unreadable_of(len(images))
    for views in encode_config.views(images, view, keys, size):
        unreadable.add(views.unreadable)
        if len(views.pixels):
            yield encode_config.to_device(views.pixels)


def _result(
    score: Score, part: EvalPart, model: EvaluatedModel, settings: EvalSettings, details: tuple[str, ...]
) -> Result:
    """The result of a score; `details` say of all of an evaluation's scores how they were measured."""
    images = part.named.splits.train if score.on_train else part.named.splits.held_out
    measured = {name: value for name, value in vars(score).items() if name not in ("on_train", "details")}
    return Result(
        **measured,
        details=(*score.details, *details),
        eval=part.named.name,
        kind=part.evaluation.kind,
        dataset=images.name,
        split=images.split,
        seed=settings.seed,
        view=str(part.evaluation.view),
        precision=_PRECISIONS[settings.encode_config.precision],
        checkpoint=model.checkpoint,
        model=model.model,
        batch_norm=part.batch_norm,
        fingerprint=part.fingerprint,
    )
