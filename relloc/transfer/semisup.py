"""Fine-tuning of all weights with few labels: 1 % or 10 % of ImageNet (docs/protocols.md 3.14).

The constants are those of OpenSelfSup's configs/benchmarks/semi_classification/
imagenet_{1percent,10percent}/ (base.py, and r50_lr*_head*.py for rates and weight decay), and the
linear layer is that of openselfsup/models/heads/cls_head.py. docs/MODEL_ZOO.md says that the best
of nine settings is reported for each method, which is a choice on the images reported on.
"""

import copy
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch

from relloc import checks
from relloc.data.image_set import ImageSet, Splits, hash_lines
from relloc.data.loader import ImageBatch
from relloc.data.subsets import Subset, evenly_spaced, list_names, listed, stratified
from relloc.data.views import View, check_cut_view, check_view
from relloc.errors import DataError
from relloc.evaluation import schedule
from relloc.evaluation.contract import BATCH_NORMS, Context, Evaluation
from relloc.results import CHOSEN_WITHOUT_TEST, Score
from relloc.terminal import quantity
from relloc.transfer.classifier import TOP, Classifier, TrainingViews, count_top_hits
from relloc.transfer.loop import Diverged, FineTuning, MicroBatch
from relloc.transfer.schedule import Milestones

_PUBLISHED_SETTINGS = 9  # three rates times three multipliers of the head's (docs/MODEL_ZOO.md)
# Which of the sets of images that hits are counted on is which.
_HELD_OUT = 0
_CHOOSING = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """One of the settings that are tried.

    `learning_rate` is that of the backbone; the head's is `head_multiplier` times as large.
    """

    learning_rate: float
    head_multiplier: float

    def __str__(self) -> str:
        return f"lr {self.learning_rate:g}, of the head x{self.head_multiplier:g}"


class Outcome(TypedDict):
    """The outcome of a setting, as it is saved.

    finite: whether loss and weights stayed finite.
    tallies: for each set of images the top-1 hits, top-5 hits and number of images.
    """

    finite: bool
    tallies: list[list[int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SemiSupervised(Evaluation):
    """Accuracy after fine-tuning all weights on a small share of the labels.

    Training is SGD with momentum; rates are multiplied by `gamma` at the milestones; batch norm
    trains, too. The labeled images are `share` of each class, drawn by the seed, or those that
    `list_file` names, one file name a line.

    Each learning rate is tried with each multiplier. `top1` and `top5` are those of the setting
    that is best on the images reported on, as published. `top1_tuned` and `top5_tuned` are those of
    the setting that is best on `choosing_images` other training images. A setting that diverged
    ranks last and is named.

    `batch_norm` says whether the backbone begins with batch-norm statistics "as_trained" or
    "recalibrated" on images in the test view, or both in a list for a training of each.

    Raises:
        ValueError: a constant with which nothing can be trained.
        DataError: `list_file` can't be read or names nothing.
    """

    kind = "fine-tuned"
    labels = "class"
    may_decode_on_device = True
    version = 2
    across_ranks = True
    tests_in_shared_batches = True
    layers = ()

    share: float
    list_file: str | None
    epochs: int
    milestone_epochs: Sequence[int]
    gamma: float
    learning_rates: Sequence[float]
    head_multipliers: Sequence[float]
    momentum: float
    weight_decay: float
    batch: int
    choosing_images: int
    augment: View
    view: View
    list_digest: str = dataclasses.field(init=False)
    # Results are told apart by it anyway, as those of frozen evaluations are.
    batch_norm: str | Sequence[str] = dataclasses.field(default="as_trained", repr=False)

    def __post_init__(self) -> None:
        checks.some_of("eval.semisup.batch_norm", self.batch_norms(()), BATCH_NORMS)
        checks.number("eval.semisup.share", self.share, above=0, at_most=1)
        if not isinstance(self.list_file, str | None):
            raise ValueError(
                f"eval.semisup.list_file is {self.list_file}: give the path of a file, or null"
            )
        check_view("eval.semisup.view", self.view)
        check_view("eval.semisup.augment", self.augment)
        schedule.check_sgd_settings("eval.semisup", self, batch_norm=True)
        checks.numbers("eval.semisup.learning_rates", self.learning_rates, above=0)
        checks.numbers("eval.semisup.head_multipliers", self.head_multipliers, above=0)
        checks.whole("eval.semisup.choosing_images", self.choosing_images)
        # Results are used again if the repr of their evaluation is the same. So what the list
        # contains has to be part of the repr, beside its path.
        names = list_names(Path(self.list_file)) if self.list_file else ()
        list_digest = hash_lines(names) if names else ""
        # A frozen dataclass can't be assigned to, also not by itself.
        object.__setattr__(self, "list_digest", list_digest)

    @property
    def settings(self) -> list[Rates]:
        """The settings that are tried: each rate with each multiplier."""
        settings = []
        for rate, multiplier in itertools.product(self.learning_rates, self.head_multipliers):
            settings.append(Rates(learning_rate=rate, head_multiplier=multiplier))
        return settings

    def check_cut_views(self, setting: str) -> None:
        super().check_cut_views(setting)
        check_cut_view(f"{setting}.augment", self.augment)

    def batch_norms(self, of_run: Sequence[str]) -> Sequence[str]:
        return [self.batch_norm] if isinstance(self.batch_norm, str) else self.batch_norm

    def run(self, context: Context) -> Iterator[Score]:
        """Yields top-1 and top-5 accuracy on held-out images after the last epoch.

        The state is saved after each epoch and after each setting. On a CPU a resumed evaluation
        ends with the same bits as one that was never stopped.

        Raises:
            DataError: images have no labels; the list does not fit; no other images are left to
                choose a setting on; or too many images can't be read.
        """
        state = context.state
        training_images, *choosing_images = self._subsets(context.splits.train, context.seed)
        # Hits on held-out images are reported; hits on other training images choose a setting.
        tested_images: list[ImageSet] = [context.splits.held_out, *choosing_images]

        # Settings that are finished are not trained again; the one after them goes on.
        saved = state.load() or {}
        outcomes: list[Outcome] = saved.get("outcomes", [])
        training_state = saved.get("training")
        remaining = self.settings[len(outcomes) :]
        for rates in remaining:
            network, finite = self._fine_tune(
                context,
                training_images,
                rates,
                outcomes,
                training_state,
            )
            tallies = []
            for images in tested_images:
                tallies.append(count_top_hits(network, images, self.view, context.encode_config))
            outcomes = [*outcomes, Outcome(finite=finite, tallies=tallies)]
            # What was saved of a training is that of the first setting alone.
            training_state = None
            state.save({"outcomes": outcomes})
        yield from self._scores(outcomes, training_images, context.seed)

    def check(self, splits: Splits) -> None:
        """Checks that images can be chosen, before anything is trained.

        Raises:
            DataError: the list does not fit, or no images are left to choose a setting on.
        """
        self._subsets(splits.train, seed=0)

    def _subsets(self, train: ImageSet, seed: int) -> list[Subset]:
        """Returns the images to train on and, for several settings, others to choose one on."""
        if self.list_file:
            training_images = listed(train, Path(self.list_file))
        else:
            training_images = stratified(train, self.share, seed=seed)
        if len(self.settings) == 1:
            return [training_images]
        used = set(training_images.indices)
        unused = [index for index in range(len(train)) if index not in used]
        if not unused:
            raise DataError(
                f"{train.name} {train.split} has no images beyond those that are trained on, so "
                "that no setting can be chosen: give one number in eval.semisup.learning_rates and "
                "head_multipliers, or a smaller share"
            )
        # Images mostly lie class by class, so evenly spaced ones are of all classes.
        chosen = evenly_spaced(len(unused), self.choosing_images)
        indices = [unused[position] for position in chosen]
        return [training_images, Subset(images=train, indices=indices)]

    def _fine_tune(
        self,
        context: Context,
        images: Subset,
        rates: Rates,
        outcomes: Sequence[Outcome],
        training_state: dict[str, Any] | None,
    ) -> tuple[Classifier, bool]:
        """Trains with one setting.

        Returns the network after the last epoch, and whether loss and weights stayed finite.
        `outcomes` are saved together with the state of the training, which begins at
        `training_state` if that is given.
        """
        # The backbone of the run is evaluated by others, too, so a copy of it is trained.
        backbone = copy.deepcopy(context.backbone)
        n_classes = len(images.classes)
        network = Classifier(backbone, n_classes, seed=context.seed)
        network = network.to(context.device)
        # Backbones come frozen from the runner; here all weights learn.
        network.requires_grad_(True)
        # The head starts from random weights, for which a higher rate may be better.
        groups = [
            {
                "params": list(network.backbone.parameters()),
                "lr": rates.learning_rate,
            },
            {
                "params": list(network.head.parameters()),
                "lr": rates.learning_rate * rates.head_multiplier,
            },
        ]
        optimizer = torch.optim.SGD(
            groups,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )
        views = TrainingViews(
            images=images,
            view=self.augment,
            batch=self.batch,
            encode_config=context.encode_config,
            seed=context.seed,
        )

        def micro_batches(first: int, end: int) -> Iterator[Sequence[MicroBatch[ImageBatch]]]:
            # One epoch after the other, as each has a line of progress of its own.
            while first < end:
                epoch = first // views.steps_per_epoch + 1
                epoch_end = epoch * views.steps_per_epoch
                what = f"{rates}, epoch {epoch} of {self.epochs}"
                yield from views.micro_batches(first, epoch_end, what)
                first = epoch_end

        training = FineTuning(
            network,
            optimizer,
            micro_batches=micro_batches,
            loss=views.loss_function(network),
            length=self.epochs,
            steps_per_unit=views.steps_per_epoch,
            schedule=Milestones(milestones=self.milestone_epochs, gamma=self.gamma),
            synchronized=True,
            seed=context.seed,
            device=context.device,
            bf16=context.encode_config.bf16,
            name=f"fine-tuning on {images.name}, {rates},",
            least_samples=2,  # of one image a batch norm may see one value, which has no variance
        )
        if training_state:
            training.load_state_dict(training_state)
        try:
            # A span is one epoch, as the schedule counts epochs.
            for _ in training.reports(every=1):
                state = {"outcomes": outcomes, "training": training.state_dict()}
                context.state.save(state)
        except Diverged:
            # Too large a rate is an outcome like others: the next setting may do.
            return network, False
        return network, True

    def _scores(
        self,
        outcomes: Sequence[Outcome],
        training_images: Subset,
        seed: int,
    ) -> Iterator[Score]:
        # Lines of the table: variant, how its setting is chosen, and on which of the sets.
        lines = [("", "", _HELD_OUT)]
        if len(self.settings) > 1:
            n_choosing = outcomes[0]["tallies"][_CHOOSING][-1]
            lines = [
                ("", "chosen on the images it is reported on, as published", _HELD_OUT),
                (
                    CHOSEN_WITHOUT_TEST,
                    f"chosen on {n_choosing} other training images",
                    _CHOOSING,
                ),
            ]
        for variant, choice, chosen_on in lines:
            best = _best_setting(outcomes, chosen_on)
            *hits, n = outcomes[best]["tallies"][_HELD_OUT]
            for top, n_right in zip(TOP, hits, strict=True):
                # Among five or fewer classes, the first five answers are always right.
                if top > 1 and top >= len(training_images.classes):
                    continue
                # The headline is the published way: top-1 of the setting that is best on test.
                yield Score(
                    table="Fine-tuned on 1 % and 10 % of the labels",
                    column=f"{100 * self.share:g} % top-{top}",
                    variant=variant,
                    layer="avgpool",
                    metric=f"top{top}_tuned" if variant else f"top{top}",
                    headline=top == 1 and not variant,
                    value=100 * n_right / n,
                    n=n,
                    protocol="OpenSelfSup semi_classification",
                    deviations=tuple(self._deviations()),
                    choice=choice,
                    details=self._details(training_images, seed, outcomes, best),
                )

    def _details(
        self,
        training_images: Subset,
        seed: int,
        outcomes: Sequence[Outcome],
        number: int,
    ) -> tuple[str, ...]:
        """Returns what a result says of its images and constants; `number` is its setting's."""
        source = f"{self.share:.3g} of each class by seed {seed}"
        if self.list_file:
            source = f"list {Path(self.list_file).name}"
        setting = str(self.settings[number])
        n_tried = len(self.settings)
        if n_tried > 1:
            setting += f", one of {n_tried} settings"
        return (
            f"fine-tuned on {len(training_images)} labeled images "
            f"({source}, hash {training_images.list_hash()})",
            setting,
            f"momentum {self.momentum:g}",
            f"weight decay {self.weight_decay:g}",
            schedule.describe_schedule(self.epochs, self.milestone_epochs, self.gamma),
            f"batch {self.batch}",
            "batch norm trained",
            f"trained on {self.augment}",
            *self._divergence(outcomes, number),
        )

    def _divergence(self, outcomes: Sequence[Outcome], number: int) -> list[str]:
        """Returns what a result of setting `number` says of settings that diverged, if any did."""
        if not outcomes[number]["finite"]:
            return ["diverged: loss or weights are not finite"]
        diverged = []
        for rates, outcome in zip(self.settings, outcomes, strict=True):
            if not outcome["finite"]:
                diverged.append(str(rates))
        return [f"diverged and ranked last: {' and '.join(diverged)}"] if diverged else []

    def _deviations(self) -> Iterator[str]:
        """Yields how this differs from what was published."""
        if not self.list_file:
            yield "the list is ours, not SimCLR's"
        n_tried = len(self.settings)
        if n_tried != _PUBLISHED_SETTINGS:
            tried = quantity(n_tried, "setting")
            yield f"{tried} tried, published is the best of {_PUBLISHED_SETTINGS}"


def _best_setting(outcomes: Sequence[Outcome], image_set: int) -> int:
    """Returns which setting has the highest top-1 accuracy on one of the sets of images.

    Settings that diverged rank last; of equal ones the first is best.
    """
    ranking = []
    for outcome in outcomes:
        hits = outcome["tallies"][image_set]
        top1_share = hits[0] / hits[-1]
        ranking.append((outcome["finite"], top1_share))
    return ranking.index(max(ranking))
