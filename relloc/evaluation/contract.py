"""Interfaces between evaluations and their runner."""

import abc
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch

from relloc import checks
from relloc.data.image_set import Splits
from relloc.data.lists import MultiLabeled
from relloc.data.shards import ShardImages
from relloc.data.views import View, check_view
from relloc.errors import DataError, UsageError
from relloc.features.source import Color, EncodeConfig, FeatureSource, LiveFeatures
from relloc.models.backbone import Backbone
from relloc.results import LAYERS, Result, Score

BATCH_NORMS = ("as_trained", "recalibrated")
Kind = Literal["frozen", "fine-tuned", "study"]
Labels = Literal["class", "presence", "own", "none"]


@runtime_checkable
class State(Protocol):
    """What a long evaluation goes on from if it was stopped: tensors and plain values, the same for all ranks.

    All ranks call `load` and `save` together. What differs between ranks is gathered before it is saved
    (`relloc.ranks.gathered`), and each rank takes its part of what was loaded.
    """

    def load(self) -> dict[str, Any] | None:
        """What rank 0 saved last, on the CPU of each rank; None at the first start."""
        ...

    def save(self, state: dict[str, Any]) -> None:
        """Keep rank 0's `state`; calls that follow one another too soon are passed over."""
        ...


class NullState:
    """A `State` that keeps nothing."""

    def load(self) -> None:
        return None

    def save(self, state: dict[str, Any]) -> None:
        pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What the runner gives an evaluation.

    `backbone` is in eval mode and on the device, and stays as it is: who trains it trains a copy.
    `train` and `held_out` are the pooled features of the splits in the evaluation's `view`, kept in
    memory or computed each time that they are asked for; of no image where it has no layers.
    `encode_config` has batch size, reading processes, device, precision and progress; the images that
    it can't read are noted for the run.
    `folder` is for pictures and tables; it belongs to this evaluation of this model, and need not exist yet.
    """

    backbone: Backbone
    splits: Splits
    train: FeatureSource
    held_out: FeatureSource
    encode_config: EncodeConfig
    seed: int
    state: State
    folder: Path

    @property
    def device(self) -> torch.device:
        return self.encode_config.device

    def augmented(self, view: View, color: Color | None) -> FeatureSource:
        """Features of the training split in random views, colored on the device, anew in each epoch."""
        return LiveFeatures(self.backbone, self.splits.train, self.encode_config, view, color=color, seed=self.seed)


class Evaluation(abc.ABC):
    """What each evaluation derives from: a frozen dataclass of its constants that says here what it is.

    kind: frozen evaluations and studies see the backbone with each of the run's batch norms; a fine-tuned
        one trains a copy of it, batch norm included, and runs once.
    labels: what an image must be labeled with: one class, the presence of each class, nothing, or what
        the evaluation looks for by itself (boxes, masks), in `check`.
    version: raised when the code computes something else, so that older results are not used again.
    across_ranks: all processes of the run call `run` together and divide its work.
    independent_layers: each of `layers` is measured for itself, so that each can be finished alone.
    keeps_features: features are read more than once, and are kept in memory where there is room.
    """

    kind: ClassVar[Kind]
    labels: ClassVar[Labels]
    version: ClassVar[int]
    across_ranks: ClassVar[bool] = False
    independent_layers: ClassVar[bool] = False
    keeps_features: ClassVar[bool] = False

    layers: Sequence[str]  # whose pooled features are read: () for none
    view: Any  # how images are seen, in words by its `str`; a relloc.data.views.View but where it is fine-tuned
    batch: int  # images that are read at once, or that a step trains on

    @abc.abstractmethod
    def run(self, context: Context) -> Iterator[Score]:
        """The scores, as they come."""

    def check_reading(self, setting: str) -> None:
        """Raises `UsageError` where layers, view or batch of the evaluation `setting` make no sense."""
        checks.some_of(f"{setting}.layers", self.layers, LAYERS)
        check_view(f"{setting}.view", self.view)
        checks.whole(f"{setting}.batch", self.batch)

    def check(self, splits: Splits) -> None:  # noqa: B027 - most evaluations ask for nothing more
        """Raises `UsageError` or `DataError`, before anything is computed, where images with the labels don't do."""

    def summary(self, rows: Sequence[Result]) -> Iterator[Result]:
        """Results about all layers together, from the rows of all of them; their fingerprints do not count."""
        return iter(())


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedEvaluation:
    """An evaluation, the name of its rows, and the images it is about.

    `unreadable_share` of them may be broken; None is the share of the run.
    """

    name: str
    evaluation: Evaluation
    splits: Splits
    unreadable_share: float | None = None

    @property
    def data_setting(self) -> str:
        """Where the user sets what the images are: the run's data, or what the evaluation brings."""
        return "data" if self.unreadable_share is None else f"eval.{self.name}.data"

    def check_images(self) -> None:
        """Raises `UsageError` where the images lack the labels that the evaluation needs, or are too few for it."""
        name, images = f"eval.{self.name}", self.splits.train.name
        if self.evaluation.labels == "class" and not self.splits.labeled:
            raise UsageError(
                f"{name}: {images} has no labels to evaluate on (train/CLASS and val/CLASS folders with the same "
                "classes): evaluate on labeled data with python -m relloc.evaluate checkpoint=… data=… "
            )
        both = (self.splits.train, self.splits.held_out)
        if self.evaluation.labels == "presence" and not all(isinstance(split, MultiLabeled) for split in both):
            message = f"{name} needs images that say of each class whether it is there (PASCAL VOC): {images} do not"
            if any(isinstance(split, ShardImages) for split in both):
                message += f"; if it is VOC, pack it again, as shards keep this now, or give {self.data_setting}.root"
            raise UsageError(message)
        try:
            self.evaluation.check(self.splits)
        except DataError as error:  # a list that is read only now; it knows of one data set a run
            raise DataError(str(error).replace("data.root", f"{self.data_setting}.root")) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """A backbone in eval mode and on its device, and the names that its rows carry.

    `weights` is the digest of the backbone's tensors: rows of the same weights can be used again.
    """

    backbone: Backbone
    checkpoint: str
    model: str
    weights: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """How evaluations are run; `bank_gib` bounds the features kept in memory."""

    encode_config: EncodeConfig
    batch_norms: Sequence[str]
    calibration_images: int
    bank_gib: float
    seed: int

    def __post_init__(self) -> None:
        checks.some_of("batch_norm", self.batch_norms, BATCH_NORMS)
