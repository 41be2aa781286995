"""What an evaluation is to those who run it: the protocols that members meet, and on what, of whom, on which terms."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch

from relloc import checks
from relloc.data.image_set import Splits
from relloc.data.lists import MultiLabeled
from relloc.data.shards import ShardImages
from relloc.data.views import View
from relloc.errors import DataError, UsageError
from relloc.features.source import (
    Color,
    EncodeConfig,
    Sets,
    State,
)
from relloc.models.backbone import Backbone
from relloc.results import Result, Score

BATCH_NORMS = ("as_trained", "recalibrated")
Labels = Literal["class", "presence", "none"]


@runtime_checkable
class Evaluation(Protocol):
    """What evals/ members are: constants, and a call that yields scores.

    `kind` is one of `relloc.results.KINDS`.
    `version` is raised when the code changes what it computes, so that older rows are not used again.
    `labels` says what an image is to be labeled with: one class, the presence of each class, or
    nothing. `keeps`: features are read more than once, so that they should be kept in memory.
    `layer_by_layer`: layers know nothing of each other, so that each can be finished alone. One that
    divides its work among processes says so by `across_ranks = True`; others run in one.
    """

    kind: ClassVar[str]
    version: ClassVar[int]
    labels: ClassVar[Labels]
    keeps: ClassVar[bool]
    layer_by_layer: ClassVar[bool]

    @property
    def layers(self) -> Sequence[str]: ...

    @property
    def view(self) -> View: ...

    def __call__(self, sets: Sets, *, device: torch.device, seed: int) -> Iterator[Score]: ...


@runtime_checkable
class Augmenting(Protocol):
    """An evaluation that trains on random views of its own (None: on the still one), colored on the device."""

    @property
    def augment(self) -> View | None: ...

    @property
    def color(self) -> Color | None: ...


@runtime_checkable
class FineTuning(Protocol):
    """An evaluation that trains all of a copy of the backbone, batch norm included."""

    kind: ClassVar[str]
    version: ClassVar[int]
    labels: ClassVar[Labels]

    @property
    def layers(self) -> Sequence[str]: ...

    @property
    def view(self) -> View: ...

    def __call__(
        self,
        backbone: Backbone,
        splits: Splits,
        *,
        reading: EncodeConfig,
        seed: int,
        state: State,
        unreadable: Callable[[dict[str, str]], None],
    ) -> Iterator[Score]: ...


@runtime_checkable
class Demanding(Protocol):
    """An evaluation that not all images with its labels are enough for."""

    def check(self, splits: Splits) -> None:
        """Raises `UsageError` where they are not; told before anything is encoded."""
        ...


@runtime_checkable
class Summarizing(Protocol):
    """An evaluation that has something to say of all its layers together."""

    def summary(self, rows: Sequence[Result]) -> Iterator[Result]:
        """From the rows of all layers; their fingerprints do not count."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """An evaluation, the name of its rows, and the images it is about.

    `unreadable_share` of them may be broken; None is the share of the run.
    """

    name: str
    evaluation: Evaluation | FineTuning
    splits: Splits
    unreadable_share: float | None = None

    @property
    def data_setting(self) -> str:
        """Where the user sets what the images are: the run's data, or what the evaluation brings."""
        return "data" if self.unreadable_share is None else f"eval.{self.name}.data"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """Who is evaluated: a backbone in eval mode and on its device, and the names its rows carry.

    `weights` is the digest of the backbone's tensors: rows of the same weights can be used again.
    """

    backbone: Backbone
    checkpoint: str
    model: str
    weights: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """How evaluations are run; `bank_gib` bounds the features kept in memory."""

    reading: EncodeConfig
    batch_norms: Sequence[str]
    calibration_images: int
    bank_gib: float
    seed: int

    def __post_init__(self) -> None:
        if not self.batch_norms:
            raise UsageError(f"batch_norm=[] leaves nothing to do: give {' or '.join(BATCH_NORMS)}, or both")
        for way in self.batch_norms:
            checks.one_of("batch_norm", way, BATCH_NORMS)


def check_images(job: Job) -> None:
    """Raises `UsageError` where the images lack the labels that the evaluation needs, or are too few for it."""
    name, images = f"eval.{job.name}", job.splits.train.name
    if job.evaluation.labels == "class" and not job.splits.labeled:
        raise UsageError(
            f"{name}: {images} has no labels to evaluate on (train/CLASS and val/CLASS folders with the same "
            "classes): evaluate on labeled data with python -m relloc.evaluate checkpoint=… data=… "
        )
    both = (job.splits.train, job.splits.held_out)
    if job.evaluation.labels == "presence" and not all(isinstance(split, MultiLabeled) for split in both):
        told = f"{name} needs images that say of each class whether it is there (PASCAL VOC): {images} do not"
        if any(isinstance(split, ShardImages) for split in both):
            told += f"; if it is VOC, pack it again, as shards keep this now, or give {job.data_setting}.root"
        raise UsageError(told)
    if isinstance(job.evaluation, Demanding):
        try:
            job.evaluation.check(job.splits)
        except DataError as error:  # a list that is read only now; it knows of one data set a run
            raise DataError(str(error).replace("data.root", f"{job.data_setting}.root")) from error
