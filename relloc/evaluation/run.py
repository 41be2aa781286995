"""Runs evaluations of one model: computes shared features once and names every number in full.

An evaluation is split into parts, each of which is finished, resumed and recognized by itself
(`split_evaluation`). Parts that see the same features form a group (`group_parts`), and a group is
measured together (`evaluate`).
"""

import copy
import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from relloc import ranks
from relloc.data.image_set import ImageSet, Splits, hash_lines
from relloc.data.lists import MultiLabeled
from relloc.data.unnamed import UNNAMED
from relloc.evaluation.calibration import CALIBRATION_VERSION
from relloc.evaluation.contract import (
    BATCH_NORMS,
    Context,
    EvalSettings,
    EvaluatedModel,
    Evaluation,
    EvaluationState,
    Labels,
    LogCurves,
    NamedEvaluation,
    print_nothing,
)
from relloc.features.bank import Bank, bank_device, bank_gib, fill_bank, format_gib, free_gib
from relloc.features.batch_norm import recalibrate
from relloc.features.source import FeatureSource, LiveFeatures
from relloc.models.backbone import Backbone
from relloc.results import PERSON, Result, Score, folder_of_files
from relloc.terminal import quantity

# The features of evaluations that read none.
NO_FEATURES = Bank(
    features={},
    labels=torch.zeros(0, dtype=torch.int64),
    n_classes=0,
    channels={},
)
# The number formats as results name them.
_PRECISIONS = {"fp32": "float32", "tf32": "TF32", "bf16": "bfloat16"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalPart:
    """The smallest unit of an evaluation of a model that is finished or resumed as a whole.

    `evaluation` is that of `named`, or the same with only one of its layers.
    """

    named: NamedEvaluation
    evaluation: Evaluation
    batch_norm: str  # one of `BATCH_NORMS`
    fingerprint: str  # from `fingerprint`, the same for the same numbers

    @property
    def folder(self) -> Path:
        """Where its pictures and tables go, relative to the run folder."""
        return folder_of_files(self.named.name, self.fingerprint)


def split_evaluation(
    named: NamedEvaluation,
    batch_norm: str,
    model: EvaluatedModel,
    settings: EvalSettings,
) -> list[EvalPart]:
    """Returns the parts of an evaluation under a batch norm.

    An evaluation whose layers are independent has one part per layer, others have a single part.
    One that is not measured under this batch norm has none.
    """
    evaluation = named.evaluation
    if batch_norm not in evaluation.batch_norms(settings.batch_norms):
        return []
    evaluations = [evaluation]
    if evaluation.independent_layers:
        evaluations = []
        for layer in evaluation.layers:
            of_layer = dataclasses.replace(evaluation, layers=(layer,))  # pyright: ignore
            evaluations.append(of_layer)

    parts = []
    for each in evaluations:
        part = EvalPart(
            named=named,
            evaluation=each,
            batch_norm=batch_norm,
            fingerprint=fingerprint(each, model, named.splits, settings, batch_norm),
        )
        parts.append(part)
    return parts


def fingerprint(
    evaluation: Evaluation,
    model: EvaluatedModel,
    splits: Splits,
    settings: EvalSettings,
    batch_norm: str,
) -> str:
    """Returns a hash of everything that decides an evaluation's numbers.

    Results with this fingerprint are used again instead of being measured. Hence it includes the
    weights, the images and their labels, all hyperparameters, the precision and the seed, and
    leaves out what only decides speed or memory. What is hashed, and in which order, must not
    change: existing results would no longer be recognized.
    """
    # The batch size decides numbers only where batch statistics are estimated, and not where that
    # is done in batches of the evaluation's own.
    calibration = ()
    if batch_norm == "recalibrated":
        calibration = (CALIBRATION_VERSION, settings.calibration_images)
        if evaluation.calibrates_in_shared_batches:
            calibration = (*calibration, settings.encode_config.batch)
        # Of most evaluations it is 0, which their results on disk were hashed without.
        if evaluation.calibration_version:
            calibration = (*calibration, evaluation.calibration_version)
    weights = (model.weights, model.model, batch_norm, calibration)
    if evaluation.wants_pretext and model.pretext:
        weights = (*weights, model.pretext.digest)
        if not _asks_pretext(evaluation, batch_norm, settings):
            weights = (*weights, "not asked")
    facts = (
        repr(evaluation),
        evaluation.version,
        weights,
        settings.encode_config.precision,
        _facts_of_images(splits, evaluation.labels),
        settings.seed,
    )
    # Left out for the decoder that results on disk were measured with.
    if evaluation.may_decode_on_device and settings.encode_config.decoder:
        facts = (*facts, settings.encode_config.decoder)
    return hash_lines([repr(facts)])


def _facts_of_images(splits: Splits, labels: Labels) -> list[Any]:
    """Returns what identifies the images of both splits and their labels, in a fingerprint."""
    both_splits = (splits.train, splits.held_out)
    facts: list[Any] = []
    for split in both_splits:
        # The folder of images without a name may be renamed: their digest says what they are.
        name = UNNAMED if splits.is_unnamed else split.name
        facts.append((name, split.split, split.digest()))
    # A digest covers one class per image; what else an image shows is hashed here.
    if labels in ("presence", "own"):
        for split in both_splits:
            if isinstance(split, MultiLabeled):
                facts.append(hash_lines(map(str, split.presence())))
    return facts


def _asks_pretext(evaluation: Evaluation, batch_norm: str, settings: EvalSettings) -> bool:
    """Returns whether the network of the pretext task is asked under this batch norm of several.

    It has statistics of its own, so that its answers under each would be the same.
    """
    return batch_norm == evaluation.batch_norms(settings.batch_norms)[0]


def group_parts(parts: Sequence[EvalPart]) -> list[list[EvalPart]]:
    """Returns the parts in the order to measure them, in groups that see the same features."""

    def sort_key(part: EvalPart) -> tuple[int | str, ...]:
        return (BATCH_NORMS.index(part.batch_norm), *_group_key(part))

    ordered = sorted(parts, key=sort_key)
    groups = []
    for _, group in itertools.groupby(ordered, key=_group_key):
        groups.append(list(group))
    return groups


def _group_key(part: EvalPart) -> tuple[str, ...]:
    """Returns a key that is equal for parts that see the same features, or none.

    It also orders groups: the "" of fine-tuning sorts first, so that networks are trained before
    features fill the memory.
    """
    evaluation = part.evaluation
    splits = part.named.splits
    kind = "" if evaluation.kind == "fine-tuned" else f"layers {bool(evaluation.layers)}"
    # Trainings recalibrate batch norm each on samples of their own, in batches of their own size.
    is_calibrated_alone = evaluation.kind == "fine-tuned" and part.batch_norm == "recalibrated"
    calibrated_for = part.named.name if is_calibrated_alone else ""
    return (
        part.batch_norm,
        kind,
        calibrated_for,
        splits.train.digest(),
        splits.held_out.digest(),
        str(part.named.unreadable_share),
        repr(evaluation.view),
        evaluation.labels,
        str(evaluation.may_decode_on_device),
    )


def evaluate(
    model: EvaluatedModel,
    parts: Sequence[EvalPart],
    settings: EvalSettings,
    *,
    run_dir: Path,
    open_state: Callable[[str], EvaluationState],
    log_of: Callable[[EvalPart], LogCurves],
    print_line: Callable[[str], None] = print_nothing,
) -> Iterator[tuple[EvalPart, list[Result]]]:
    """Yields each part of a group from `group_parts` with its results, as they are measured.

    `open_state` returns the state that the part with a given fingerprint resumes from, and `log_of`
    the function that writes the curves of a part. `print_line` prints what evaluations say in
    words.
    """
    # All parts of a group agree in everything that is read from the first one here.
    first = parts[0]
    # The names of images that the device's decoder left to the CPU, so far.
    left_to_cpu: dict[str, str] = {}
    encode_config = dataclasses.replace(
        first.named.encode_config(settings.encode_config), note_left_to_cpu=left_to_cpu.update
    )
    settings = dataclasses.replace(settings, encode_config=encode_config)
    backbone, details = _prepare_backbone(model.backbone, first, settings)
    details = (*model.details, *details)

    live_train = live_held_out = NO_FEATURES
    cached_train = cached_held_out = NO_FEATURES
    if first.evaluation.layers:
        # Nothing is read or computed until an evaluation asks for features.
        splits = first.named.splits
        live_train = _live_features(backbone, splits.train, first.evaluation, settings)
        live_held_out = _live_features(backbone, splits.held_out, first.evaluation, settings)
        cached_train, cached_held_out = _cache_features(live_train, live_held_out, parts, settings)

    for part in parts:
        cached = part.evaluation.keeps_features
        context = Context(
            backbone=backbone,
            splits=part.named.splits,
            train=cached_train if cached else live_train,
            held_out=cached_held_out if cached else live_held_out,
            encode_config=settings.encode_config,
            seed=settings.seed,
            state=open_state(part.fingerprint),
            folder=run_dir / part.folder,
            log=log_of(part),
            print_line=print_line,
            pretext=model.pretext if part.evaluation.wants_pretext else None,
            asks_pretext=_asks_pretext(part.evaluation, part.batch_norm, settings),
            checkpoint=model.checkpoint,
        )
        scores = list(part.evaluation.run(context))
        # Known only now that the images were read
        decoding = _decoding_details(encode_config.decoder, left_to_cpu)
        yield (
            part,
            [_to_result(score, part, model, settings, details, decoding) for score in scores],
        )


def _decoding_details(decoder: str, left_to_cpu: dict[str, str]) -> tuple[str, ...]:
    """Returns details on who decoded the images; `left_to_cpu` names those of this process."""
    if not decoder:
        return ()
    details = [f"JPEGs decoded by {decoder}"]
    n_left = len(ranks.union(left_to_cpu))
    if n_left:
        details.append(f"decoded by the CPU in its place: {quantity(n_left, 'JPEG', commas=True)}")
    return tuple(details)


def _prepare_backbone(
    backbone: Backbone,
    part: EvalPart,
    settings: EvalSettings,
) -> tuple[Backbone, tuple[str, ...]]:
    """Returns the backbone with the part's batch-norm statistics, and details for its results."""
    if part.batch_norm == "as_trained":
        return backbone, ()
    # Recalibration changes the statistics, so it works on a copy: other groups need the original.
    backbone = copy.deepcopy(backbone)
    batches = part.evaluation.calibration_batches(
        part.named.splits.train,
        n_images=settings.calibration_images,
        seed=settings.seed,
        config=settings.encode_config,
    )
    forward = part.evaluation.calibration_forward(backbone)
    n_images = recalibrate(backbone, batches, forward)
    detail = f"batch-norm statistics re-estimated on {n_images} training images without labels"
    return backbone, (detail,)


def _live_features(
    backbone: Backbone,
    images: ImageSet,
    evaluation: Evaluation,
    settings: EvalSettings,
) -> LiveFeatures:
    return LiveFeatures(
        backbone,
        images,
        settings.encode_config,
        evaluation.view,
        labels=_labels(images, evaluation.labels),
    )


def _labels(images: ImageSet, needed: Labels) -> Int[Tensor, "n *classes"] | None:
    """Returns the labels that accompany features.

    None stands for the images' own classes; zeros are for evaluations that need no label.
    """
    if needed == "presence" and isinstance(images, MultiLabeled):
        return torch.as_tensor(images.presence())
    if needed == "class":
        return None
    return torch.zeros(len(images), dtype=torch.int64)


def _cache_features(
    train: FeatureSource,
    held_out: FeatureSource,
    parts: Sequence[EvalPart],
    settings: EvalSettings,
) -> tuple[FeatureSource, FeatureSource]:
    """Returns both sources with the features that several parts read in memory, if there is room.

    Otherwise it returns them as they are: features are then computed each time they are asked for.
    """
    # With several processes, an evaluation that keeps features divides them among the processes.
    if ranks.world_size() > 1:
        return train, held_out

    # Only features that an evaluation reads more than once are worth their memory.
    layers = set()
    for part in parts:
        if part.evaluation.keeps_features:
            layers.update(part.evaluation.layers)
    layers = sorted(layers)
    needed = bank_gib(train, layers) + bank_gib(held_out, layers)
    if not layers or needed > settings.bank_gib:
        return train, held_out

    device = bank_device(needed, settings.encode_config.device)
    free = free_gib(device)
    if needed > free:
        names = ", ".join(layers)
        warnings.warn(
            f"features of {names} take {format_gib(needed)}, and {format_gib(free)} of memory are "
            "free: they are not kept in memory but computed again each time, which is slow",
            stacklevel=2,
        )
        return train, held_out
    batch = settings.encode_config.batch
    train_bank = fill_bank(train, layers, batch, device)
    held_out_bank = fill_bank(held_out, layers, batch, device)
    return train_bank, held_out_bank


def _to_result(
    score: Score,
    part: EvalPart,
    model: EvaluatedModel,
    settings: EvalSettings,
    details: tuple[str, ...],
    decoding: tuple[str, ...],
) -> Result:
    """Returns the score as a `Result`; `details` and `decoding` are added to those of the score."""
    splits = part.named.splits
    images = splits.train if score.on_train else splits.held_out
    # A score and a result share their fields, except for what the runner knows.
    measured = vars(score).copy()
    del measured["on_train"]  # from here on, `split` says it
    del measured["of_person"]  # and `checkpoint`
    of_part = {
        "dataset": images.name,
        "split": images.split,
        "view": str(part.evaluation.view),
        "batch_norm": part.batch_norm,
    }
    for name, value in of_part.items():
        measured[name] = measured[name] or value
    # The details are about the backbone, under the part's batch norm.
    if measured["batch_norm"] == part.batch_norm and not score.of_person:
        measured["details"] = (*score.details, *details)
    measured["details"] = (*measured["details"], *decoding)
    return Result(
        **measured,
        eval=part.named.name,
        kind=part.evaluation.kind,
        seed=settings.seed,
        precision=_PRECISIONS[settings.encode_config.precision],
        checkpoint=PERSON if score.of_person else model.checkpoint,
        model="" if score.of_person else model.model,
        strides="" if score.of_person else model.strides,
        decoder=settings.encode_config.decoder,
        fingerprint=part.fingerprint,
    )
