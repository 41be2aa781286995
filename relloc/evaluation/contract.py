"""Interfaces between evaluations and their runner.

An evaluation is a frozen dataclass of its hyperparameters that derives from `Evaluation`. The
runner (`relloc.evaluation.run`) hands it a `Context` with the model and its features; the
evaluation yields a `Score` for each number it measures.
"""

import abc
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import nn

from relloc import checks
from relloc.checkpoints.paths import BACKBONE_FILE
from relloc.data.image_set import ImageSet, Splits
from relloc.data.lists import MultiLabeled
from relloc.data.processes import NamedProgress, without_named_progress
from relloc.data.shards import ShardImages
from relloc.data.unusable import unusable_images
from relloc.data.views import View, check_cut_view, check_view
from relloc.errors import DataError, UsageError
from relloc.evaluation.calibration import calibration_batches
from relloc.features.source import ColorAugmentation, EncodeConfig, FeatureSource, LiveFeatures
from relloc.models.backbone import Backbone
from relloc.patches.pipeline import PatchPipeline
from relloc.results import LAYERS, Result, Score

# Writes numbers of a training, by their names, at a step of it into the curves of the run.
LogCurves = Callable[[Mapping[str, float], int], None]
# Which statistics batch norm has when an evaluation begins: those of the pretraining, which are of
# patches, or ones estimated anew on the whole images that the evaluation shows.
BATCH_NORMS = ("as_trained", "recalibrated")
Kind = Literal["frozen", "fine-tuned", "study"]
Labels = Literal["class", "presence", "own", "none"]


@runtime_checkable
class EvaluationState(Protocol):
    """Storage from which a long evaluation resumes after it was stopped.

    A state is a dictionary of tensors and plain values, the same for all ranks. All ranks call
    `load` and `save` together. What differs between ranks is gathered before it is saved
    (`relloc.ranks.gathered`), and each rank takes its part of what was loaded.
    """

    def load(self) -> dict[str, Any] | None:
        """Returns what rank 0 saved last, on the CPU of each rank; None at the first start."""
        ...

    def save(self, state: dict[str, Any]) -> None:
        """Saves the `state` of rank 0; calls that follow one another too soon are skipped."""
        ...


class NullState:
    """An `EvaluationState` that saves nothing, for tests and evaluations that are not resumed."""

    def load(self) -> None:
        return None

    def save(self, state: dict[str, Any]) -> None:
        pass


def log_nothing(_numbers: Mapping[str, float], _step: int) -> None:
    """Writes no curves."""


def print_nothing(_line: str) -> None:
    """Prints nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretextModel:
    """A trained network of the pretext task, and how the patches that it was trained on are made.

    `network` takes patches (b 9 3 p p) and returns logits (b 8 8): of each pair of a neighbor and
    the center, and each label. It is in eval mode and on the device of the backbone, whose weights
    it has copies of. `digest` identifies its weights and settings. `changed` says that a curriculum
    changed the patches in the course of the training: `patches` are those of its end.
    """

    network: nn.Module
    patches: PatchPipeline
    digest: str
    changed: bool = False

    @property
    def as_asked(self) -> str:
        """How questions are asked that are made with `patches`, in words."""
        return "as at the end of training" if self.changed else "as in training"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """Everything that the runner gives an evaluation: the model, its features and the settings."""

    # In eval mode and on the device. It must not change: fine-tuning trains a copy.
    backbone: Backbone
    splits: Splits
    # Pooled features of both splits in the evaluation's `view`, either kept in memory or computed
    # each time they are asked for; empty for an evaluation without layers.
    train: FeatureSource
    held_out: FeatureSource
    # Batch size, number of reading processes, device, precision and progress bar. It also records
    # for the run which images cannot be read.
    encode_config: EncodeConfig
    seed: int  # the run's seed, from which the evaluation derives its own
    state: EvaluationState  # where a long evaluation saves its progress
    # For pictures and tables. It belongs to this evaluation of this model, and need not exist yet.
    folder: Path
    log: LogCurves = log_nothing  # for trainings, such as their loss
    # Prints a line for the user, for findings in words beside the numbers.
    print_line: Callable[[str], None] = print_nothing
    # For an evaluation that declares `wants_pretext`: None for weights that have no pretext head,
    # such as random ones and files of other projects.
    pretext: PretextModel | None = None
    # Whether to ask that network here. It answers under batch norm as trained, whatever the one of
    # the backbone is, so that one of several batch norms is enough.
    asks_pretext: bool = True
    # "random" and "torchvision" for weights to compare with, "person" for none, otherwise a path
    checkpoint: str = ""

    @property
    def weights(self) -> str:
        """A name of the weights for titles of pictures: of a run's weights that of its folder."""
        file = Path(self.checkpoint)
        return file.parent.name if file.name == BACKBONE_FILE else file.name

    @property
    def device(self) -> torch.device:
        """The device of the backbone."""
        return self.encode_config.device

    def augmented(
        self,
        view: View,
        color: ColorAugmentation | None,
    ) -> FeatureSource:
        """Returns features of the training split in random views that are new in each epoch.

        `color` changes the colors of the views, on the device; None leaves them as they are.
        """
        return LiveFeatures(
            self.backbone,
            self.splits.train,
            self.encode_config,
            view,
            color=color,
            seed=self.seed,
        )


class Evaluation(abc.ABC):
    """Base class of all evaluations: frozen dataclasses whose fields are their hyperparameters.

    A hash of the `repr` decides which results are already measured, so a field that decides no
    number is declared with `repr=False`. Class attributes declare what the evaluation is.
    """

    # "frozen" and "study" see the backbone under each of the run's batch norms; "fine-tuned" trains
    # a copy of it, under batch norms of its own choice.
    kind: ClassVar[Kind]
    # What an image must be labeled with: one class ("class"), the presence of each class
    # ("presence"), nothing ("none"), or what the evaluation itself looks for in `check`, such as
    # boxes or masks ("own").
    labels: ClassVar[Labels]
    # To raise when the code computes something else, so that older results are measured again.
    version: ClassVar[int]
    # To raise when batch norm is recalibrated otherwise: results as trained are still recognized.
    calibration_version: ClassVar[int] = 0
    # All processes of the run call `run` together and divide the work.
    across_ranks: ClassVar[bool] = False
    # Each of `layers` is measured by itself, and can be finished and resumed by itself.
    independent_layers: ClassVar[bool] = False
    # Features are read more than once, and are kept in memory if there is room.
    keeps_features: ClassVar[bool] = False
    # A fine-tuned evaluation whose test encodes as many images at once as `EncodeConfig.batch` has.
    tests_in_shared_batches: ClassVar[bool] = False
    # Batch norm is recalibrated on as many images at once as `EncodeConfig.batch` has, which then
    # decides numbers. A training of its own samples has a batch of its own.
    calibrates_in_shared_batches: ClassVar[bool] = True
    # Its images are views that `EncodeConfig` reads, so that they may be decoded on the device.
    may_decode_on_device: ClassVar[bool] = False
    # The network of the pretext task is loaded too, where the checkpoint has one.
    wants_pretext: ClassVar[bool] = False
    # Nothing can be measured without that network: weights that have none are left out.
    needs_pretext: ClassVar[bool] = False
    # What is measured is of the backbone or of the network of the pretext task. Otherwise a person
    # may answer without any (`relloc.results.PERSON`).
    needs_network: ClassVar[bool] = True
    # The same settings give the same numbers, so that rows of other runs are used in place of
    # measuring again. That is not so for answers of a person.
    repeatable: ClassVar[bool] = True

    layers: Sequence[str]  # whose pooled features are read; () for none
    # How images are cropped and resized, in words by its `str`: a relloc.data.views.View, except
    # for fine-tuned evaluations, whose own type also names the training views.
    view: Any
    batch: int  # number of images that are read at once, or that a step trains on

    @abc.abstractmethod
    def run(self, context: Context) -> Iterator[Score]:
        """Yields the scores as they are measured."""

    def check_inputs(self, setting: str) -> None:
        """Checks layers, view and batch of the evaluation that is configured at `setting`.

        Raises:
            UsageError: one of them is wrong; the message names it and its value.
        """
        checks.some_of(f"{setting}.layers", self.layers, LAYERS)
        check_view(f"{setting}.view", self.view)
        checks.whole(f"{setting}.batch", self.batch)

    def check_cut_views(self, setting: str) -> None:
        """Checks that a device can make the views, if it may decode the images.

        Raises:
            UsageError: it can't; the message names the view.
        """
        if self.may_decode_on_device:
            check_cut_view(f"{setting}.view", self.view)

    def batch_norms(self, of_run: Sequence[str]) -> Sequence[str]:
        """Returns the batch norms, of `BATCH_NORMS`, that it is measured under.

        `of_run` are those of the run. Fine-tuning takes as long as it takes for each of them, and
        trains batch norm with the weights, so it has only "as_trained" unless it says otherwise.
        """
        return ("as_trained",) if self.kind == "fine-tuned" else of_run

    def calibration_batches(
        self, images: ImageSet, *, n_images: int, seed: int, config: EncodeConfig
    ) -> Iterator[Any]:
        """Yields training images (b 3 h w) to recalibrate batch norm on, on the device.

        About `n_images` of `images` are drawn by the run's seed.
        """
        return calibration_batches(images, self.view, n_images=n_images, seed=seed, config=config)

    def calibration_forward(self, backbone: Backbone) -> Callable[[Any], Any]:
        """Returns a forward of the backbone by which its batch norm is recalibrated.

        It takes what `calibration_batches` yields and passes all batch norms, on inputs such as the
        evaluation gives them.
        """
        return backbone.embed

    def check(self, splits: Splits) -> None:  # noqa: B027 - most evaluations have no further demands
        """Checks before any computation whether the evaluation can work on these images.

        The kind of labels that `labels` asks for has been checked before.

        Raises:
            UsageError, DataError: the images will not do; the message says why.
        """

    def check_network(self, backbone: Backbone) -> None:  # noqa: B027 - most take any network
        """Checks before any computation whether the evaluation can work on this network.

        `backbone` is in evaluation mode, and may lie on PyTorch's meta device, whose tensors have
        shapes but no values.

        Raises:
            UsageError: the network will not do with the settings; the message says why.
        """

    def summary(self, rows: Sequence[Result]) -> Iterator[Result]:
        """Yields results that need all layers, such as the best layer, from the rows of all layers.

        They are derived again whenever rows are, so the fingerprints of the results do not count.
        """
        return iter(())


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedEvaluation:
    """An evaluation under its name in the config, with the images that it is measured on.

    `unreadable_share` is the share of these images that may be broken; None if the images are the
    run's own, for which the run's share holds. `how_to_give` says how to choose images that the
    evaluation brings. `group` is the config group that it was chosen from: "eval" or "study".
    """

    name: str
    evaluation: Evaluation
    splits: Splits
    group: str = "eval"
    unreadable_share: float | None = None
    how_to_give: str = ""

    @property
    def data_setting(self) -> str:
        """The setting that chooses the images: the run's `data`, or the evaluation's own."""
        if self.unreadable_share is None:
            return "data"
        return f"{self.group}.{self.name}.data"

    def encode_config(self, of_run: EncodeConfig) -> EncodeConfig:
        """Returns how the images are read: as the run does it, with the share that may be broken.

        `of_run` has the run's own share, which holds for the run's own images. Images are decoded
        on the CPU unless the evaluation says that they may be decoded on the device.
        """
        if not self.evaluation.may_decode_on_device:
            of_run = dataclasses.replace(of_run, decode="cpu")
        if self.unreadable_share is None:
            return of_run
        return dataclasses.replace(
            of_run,
            unreadable_share=self.unreadable_share,
            share_setting=f"{self.data_setting}.unreadable_share",
        )

    def check_files(
        self, of_run: EncodeConfig, progress: NamedProgress = without_named_progress
    ) -> None:
        """Checks before a training that enough image files are there, and can be used.

        A training meets its images one after the other, and those to test on after hours. `of_run`
        says how the run reads images.

        Raises:
            DataError: more are missing or truncated, or have annotations that can't be used, than
                may be broken.
        """
        # Other evaluations meet all the images that they need within minutes.
        if self.evaluation.kind != "fine-tuned":
            return
        for images in (self.splits.train, self.splits.held_out):
            reasons = unusable_images(
                images, workers=of_run.workers, stopping=of_run.stopping, progress=progress
            )
            self.encode_config(of_run).unreadable_of(len(images)).add(reasons)

    def check_images(self) -> None:
        """Checks that the images have the labels that the evaluation needs, and enough of them.

        Raises:
            UsageError: labels are missing, or there are too few images.
            DataError: a list of labels is missing or damaged.
        """
        setting = f"{self.group}.{self.name}"
        dataset = self.splits.train.name
        both_splits = (self.splits.train, self.splits.held_out)

        if self.evaluation.labels == "class" and not self.splits.labeled:
            advice = "evaluate on labeled data with python -m relloc.evaluate checkpoint=… data=…"
            if self.how_to_give:
                advice = f"give labeled images by {self.how_to_give}"
            raise UsageError(
                f"{setting}: {dataset} has no labels to evaluate on (train/CLASS and val/CLASS "
                f"folders with the same classes): {advice}"
            )

        if self.evaluation.labels == "presence":
            have_presence = all(isinstance(split, MultiLabeled) for split in both_splits)
            if not have_presence:
                message = (
                    f"{setting} needs images that say of each class whether it is in the image "
                    f"(PASCAL VOC): {dataset} do not"
                )
                # Shards that older versions packed have lost what VOC says of each class.
                if any(isinstance(split, ShardImages) for split in both_splits):
                    message += "; if it is VOC, pack it again, as shards keep this now, or give "
                    message += f"{self.data_setting}.root"
                raise UsageError(message)

        try:
            self.evaluation.check(self.splits)
        except DataError as error:
            # A list of labels was read only now, by a data set that believes itself the run's own.
            message = str(error).replace("data.root", f"{self.data_setting}.root")
            raise DataError(message) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """A backbone in eval mode and on its device, and the names that its results carry."""

    backbone: Backbone
    checkpoint: str  # its path, or "random" or "torchvision"; "person" where there is no network
    # The name of the architecture, with settings of the backbone that differ from what the name
    # stands for, such as "resnet50 width=2"; "" for a person.
    model: str
    # A digest of the backbone's tensors: results of equal weights can be used again, whatever file
    # the weights come from.
    weights: str
    pretext: PretextModel | None = None
    # "as_trained" if the backbone has strides of its own; "" for the standard ones
    strides: str = ""
    details: tuple[str, ...] = ()  # facts about the network, for all of its results


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """Settings that all evaluations of a run share."""

    encode_config: EncodeConfig  # how images are read and encoded
    # Some of `BATCH_NORMS`; frozen evaluations are measured under each of them, and others under
    # those of their own (`Evaluation.batch_norms`).
    batch_norms: Sequence[str]
    # Number of training images that recalibrated batch-norm statistics are estimated on.
    calibration_images: int
    bank_gib: float  # the most memory, in GiB, for features that several evaluations read
    seed: int

    def __post_init__(self) -> None:
        checks.some_of("batch_norm", self.batch_norms, BATCH_NORMS)
