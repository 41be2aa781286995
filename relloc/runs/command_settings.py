"""What relloc.train, relloc.evaluate and relloc.prepare are to do, as frozen dataclasses.

They check themselves, so that making one finds a wrong setting before anything is computed.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from relloc import checks, neutral
from relloc.data.order import StepPlan
from relloc.data.packing import Packing
from relloc.errors import DamagedFile, UsageError
from relloc.models.backbone import Backbone
from relloc.patches.curriculum import TrainingPatches
from relloc.patches.pipeline import PatchPipeline
from relloc.pretext.questions import Questions, head_sizes
from relloc.pretext.relative_location import RelativeLocation
from relloc.pretext.schedule import Schedule
from relloc.results import NO_FILES, PERSON, REFERENCE_MODELS
from relloc.runs.data_sets import DataSet
from relloc.runs.run_settings import RunSettings
from relloc.runs.settings import content_of
from relloc.sweeps.points import Point
from relloc.sweeps.trainings import find_trainings

_DAY_S = 86400.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A network that is made when it is needed.

    `settings` are those of conf/model, which are also written into the file of a backbone.
    """

    name: str
    settings: Mapping[str, Any]
    make_backbone: Callable[[], Backbone]
    make_head: Callable[..., torch.nn.Module]

    def backbone(self, seed: int) -> Backbone:
        """Returns a backbone initialized with the seed `seed`."""
        # Layers draw their initial weights from the global generator of PyTorch.
        torch.manual_seed(seed)
        return self.make_backbone()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MonitorSettings:
    """Settings of the monitors, which measure the network on held-out images during training.

    They run every `every_epochs` epochs, or never if that is None.
    """

    every_epochs: float | None
    images: int
    k: int
    most_share: float

    def __post_init__(self) -> None:
        if self.every_epochs is not None:
            checks.number("monitor.every_epochs", self.every_epochs, at_least=0, at_most=math.inf)
        checks.whole("monitor.images", self.images)
        checks.whole("monitor.k", self.k)
        checks.number("monitor.most_share", self.most_share, at_least=0, at_most=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretraining(RunSettings):
    """A pretraining, and the evaluations at its end.

    `identity` maps the names of the settings that decide what is computed to their values: a run is
    resumed only with the same ones. `images_per_forward` and `collapse_steps` are None where they
    follow from other settings. `flip` is the probability that an image is mirrored.
    """

    model: Model
    flip: float
    training_patches: TrainingPatches
    questions: Questions
    schedule: Schedule
    recipe_epochs: float
    make_optimizer: Callable[..., torch.optim.Optimizer]
    batch_norm: str
    images_per_step: int
    images_per_batch_norm: int
    images_per_forward: int | None
    collapse_steps: int | None
    milestones: Sequence[float]
    save_recalibrated: bool
    report_every_steps: int
    monitor: MonitorSettings
    identity: Mapping[str, Any]

    def __post_init__(self) -> None:
        super().__post_init__()
        # Numbers of images and steps, each by the name of its setting
        checks.whole("recipe.images_per_step", self.images_per_step)
        checks.whole("recipe.images_per_batch_norm", self.images_per_batch_norm)
        if self.images_per_forward is not None:
            checks.whole("images_per_forward", self.images_per_forward)
        if self.collapse_steps is not None:
            checks.whole("collapse_steps", self.collapse_steps)
        checks.whole("report_every_steps", self.report_every_steps)
        checks.true_or_false("save_recalibrated", self.save_recalibrated)
        checks.number("pretext_flip", self.flip, at_least=0, at_most=1)
        checks.numbers("milestones", self.milestones, at_least=0, may_be_empty=True)
        # Checks that the batches divide. One process divides them in the most ways; how many
        # processes there are is known only where the run starts.
        StepPlan(
            n_images=self.images_per_step,
            images_per_step=self.images_per_step,
            images_per_batch_norm=self.images_per_batch_norm,
            images_per_forward=self.images_per_forward or self.images_per_batch_norm,
        )

    @property
    def needs_own_data(self) -> bool:
        return True

    @property
    def patches(self) -> PatchPipeline:
        """Makes patches as at the end of the training, with which the network is evaluated."""
        return self.training_patches.patches

    @property
    def about(self) -> dict[str, Any]:
        """What a file of weights says of itself: the model's settings and those of its training."""
        model = neutral.without_later(self.model.settings, "model.")
        return {"model": model, "computed": dict(self.identity)}

    def network(self, *, one_pass: bool = False) -> RelativeLocation:
        """Returns the backbone and its head, initialized with the seed.

        `one_pass` is passed to `RelativeLocation`.
        """
        backbone = self.model.backbone(self.seed)
        head = self.model.make_head(
            embedding_dim=backbone.embedding_dim, **head_sizes(self.questions)
        )
        return RelativeLocation(
            backbone,
            head,
            questions=self.questions,
            batch_norm=self.batch_norm,  # pyright: ignore[reportArgumentType] - which it checks
            images_per_batch_norm=self.images_per_batch_norm,
            one_pass=one_pass,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchSettings:
    """Which trainings are watched: run folders, and names or folders of sweeps.

    `every_s` seconds lie between two looks for new checkpoints. After `patience_min` minutes in
    which no training ran, those that are not at their end are given up.
    """

    names: Sequence[str]
    every_s: float
    patience_min: float

    def __post_init__(self) -> None:
        if not self.names or not all(isinstance(name, str) and name for name in self.names):
            raise UsageError(
                f"watch={self.names} names no training: give the run folder of one, or a sweep"
            )
        # Without a pause, files and schedulers would be asked all the time.
        checks.number("watch_every_s", self.every_s, above=0, at_most=_DAY_S)
        checks.number("watch_patience_min", self.patience_min, at_least=0, at_most=math.inf)

    def trainings(self) -> tuple[list[Point], list[DamagedFile]]:
        """Returns the trainings there are now, and the errors of those whose files are damaged.

        Raises:
            UsageError: a name names no training, or none that is left is sound.
        """
        return find_trainings("watch", self.names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluating(RunSettings):
    """Evaluations of the backbones that `checkpoints` name, or of those that trainings save.

    A `model` of None stands for the one that each checkpoint's file names. With `watch` there are
    no `checkpoints`.
    """

    checkpoints: Sequence[str]
    watch: WatchSettings | None
    checkpoint_prefix: str | None
    model: Model | None
    verdict: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        are_names = all(isinstance(name, str) and name for name in self.checkpoints)
        if self.watch:
            self._check_watch(self.watch)
        elif not self.checkpoints or not are_names:
            raise UsageError(
                f"checkpoint={self.checkpoints} names no backbone: "
                "give a run folder, a file, or random"
            )
        if not self.evaluations:
            raise UsageError(
                "study=[] with eval=[] leaves nothing to do: give relloc.study one such as "
                "study=neighbors (--help study lists them), or relloc.evaluate some such as "
                "eval=[linear_fast,knn]"
            )
        if PERSON in self.checkpoints:
            self._check_person()
        self._refuse_unused_view()
        self._refuse_unused_decoding()

    def _check_watch(self, watch: WatchSettings) -> None:
        """Raises `UsageError` for settings that mean nothing where trainings are watched."""
        given = f"watch={','.join(watch.names)}"
        if self.checkpoints:
            raise UsageError(
                f"{given} evaluates the checkpoints of a training, and "
                f"checkpoint={','.join(map(str, self.checkpoints))} names others: leave one out"
            )
        if self.checkpoint_prefix is not None:
            raise UsageError(f"{given} has no prefixes: leave checkpoint_prefix out")
        if self.verdict:
            raise UsageError(f"{given} has no published numbers: leave verdict=true out")

    def _check_person(self) -> None:
        """Raises `UsageError` where a person is asked for what only a network can answer."""
        for chosen in self.evaluations:
            if chosen.evaluation.needs_network:
                raise UsageError(
                    f"checkpoint={PERSON} stands for a person without a network, and "
                    f"{chosen.group}={chosen.name} looks into one: give checkpoint=RUN_FOLDER, or "
                    f"leave {chosen.name} out"
                )
        if self.model is not None and set(self.checkpoints) == {PERSON}:
            raise UsageError(
                f"model={self.model.name} would change nothing, since checkpoint={PERSON} is a "
                "person without a network: leave it out, or give checkpoint=RUN_FOLDER"
            )

    def _refuse_unused_view(self) -> None:
        """Raises `UsageError` for a setting of `view` that was given and changes nothing."""
        given = {
            "short_px": self.view.short_px,
            "crop_px": self.view.crop_px,
            "batch": self.view_batch,
        }
        by_default = content_of("_settings")["view"]
        used = self.used_view_settings(self.batch_norms)
        unused = []
        for name, value in given.items():
            if value != by_default[name] and name not in used:
                unused.append(f"view.{name}={value}")
        if unused:
            names = [chosen.name for chosen in self.evaluations]
            listed = names[0] if len(names) == 1 else f"[{','.join(names)}]"
            group = self.evaluations[0].group
            own = f"{group}.{names[0]}"
            raise UsageError(
                f"{' '.join(unused)} would change nothing of {group}={listed}, which has settings "
                f"of its own, such as those of {own}.view and {own}.batch: give these (--help "
                f"{group}={names[0]} lists them), or leave it out"
            )

    def _refuse_unused_decoding(self) -> None:
        """Raises `UsageError` for decode=device where no evaluation decodes on the device."""
        may_decode = any(one.evaluation.may_decode_on_device for one in self.evaluations)
        if self.decode == "device" and not may_decode:
            names = ", ".join(one.name for one in self.evaluations)
            raise UsageError(
                f"decode=device would change nothing of {names}, whose images are always decoded "
                "on the cpu: leave it out"
            )

    def check_paths(self, made_by_jobs: Sequence[str]) -> None:
        for name in self.checkpoints:
            if name not in NO_FILES and not Path(name).exists():
                raise UsageError(
                    f"checkpoint={name} is not there: "
                    f"give a run folder, a file, or {' or '.join(REFERENCE_MODELS)}"
                )
        if self.watch:
            self.watch.trainings()
        super().check_paths(made_by_jobs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preparing:
    """A check of a data set and, unless `out` is None, the packing of its images into `out`.

    `workers` is the number of processes, None for one per core.
    """

    data: DataSet
    out: str | None
    packing: Packing
    workers: int | None

    def __post_init__(self) -> None:
        if self.workers is not None:
            checks.whole("workers", self.workers)
        if self.out == "":
            raise UsageError(
                "out= names no folder: give out=FOLDER to pack into, or leave it out to check only"
            )
        if self.out is not None and self.data.shards:
            raise UsageError(
                "data.shards names images that are packed already: "
                "give data.root to pack the originals"
            )
