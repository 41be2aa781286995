"""Fine-tuning the whole network with few labels, as OpenSelfSup does with 1 % and 10 % of ImageNet.

Its constants are those of OpenSelfSup's configs/benchmarks/semi_classification/
imagenet_{1percent,10percent}/ (base.py, and r50_lr*_head*.py for rates and weight decay), its head that
of openselfsup/models/heads/cls_head.py; docs/MODEL_ZOO.md tells that of nine settings the best is
reported for each method, which is a choice on the images that are reported on.
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
from relloc.data.subsets import Subset, evenly_spaced, list_names, listed, stratified
from relloc.data.views import View, check_view
from relloc.errors import DataError
from relloc.evaluation import schedule
from relloc.evaluation.contract import Context, Evaluation
from relloc.results import CHOSEN_WITHOUT_TEST, Score
from relloc.transfer.classifier import TOP, Classifier, TrainingViews, count_top_hits
from relloc.transfer.loop import Diverged, FineTuning
from relloc.transfer.schedule import Milestones

_PUBLISHED_SETTINGS = 9  # three rates and three multipliers of the head's (docs/MODEL_ZOO.md)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """One of the settings that are tried: the trunk's learning rate, and how many times that the head has."""

    learning_rate: float
    head_multiplier: float

    def __str__(self) -> str:
        return f"lr {self.learning_rate:g}, of the head x{self.head_multiplier:g}"


class Outcome(TypedDict):
    """What became of a setting: whether loss and weights stayed finite; hits of top 1, of top 5 and images a set."""

    finite: bool
    tallies: list[list[int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SemiSupervised(Evaluation):
    """SGD with momentum on all weights; rates times `gamma` at the milestones; batch norm trains with it.

    The images are `share` of each class by `seed`, or what `list_file` names, one file name a line.
    With several settings (each rate with each multiplier) `top1` and `top5` are those of the setting
    that is best on the images reported on, as published, and `top1_tuned` and `top5_tuned` those of
    the setting that is best on `choosing_images` other training images. A setting that diverged ranks
    last and is named.

    Raises:
        ValueError: constants that would train nothing.
        DataError: `list_file` can't be read or names nothing.
    """

    kind = "fine-tuned"
    labels = "class"
    version = 2
    across_ranks = True
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

    def __post_init__(self) -> None:
        checks.number("eval.semisup.share", self.share, above=0, at_most=1)
        if not isinstance(self.list_file, str | None):
            raise ValueError(f"eval.semisup.list_file is {self.list_file}: give the path of a file, or null")
        check_view("eval.semisup.view", self.view)
        check_view("eval.semisup.augment", self.augment)
        schedule.check_sgd_settings("eval.semisup", self, batch_norm=True)
        checks.numbers("eval.semisup.learning_rates", self.learning_rates, above=0)
        checks.numbers("eval.semisup.head_multipliers", self.head_multipliers, above=0)
        checks.whole("eval.semisup.choosing_images", self.choosing_images)
        # What the list holds is part of what decides the numbers, and so of this object's repr.
        names = list_names(Path(self.list_file)) if self.list_file else ()
        object.__setattr__(self, "list_digest", hash_lines(names) if names else "")

    @property
    def settings(self) -> list[Rates]:
        return [
            Rates(learning_rate=rate, head_multiplier=times)
            for rate, times in itertools.product(self.learning_rates, self.head_multipliers)
        ]

    def run(self, context: Context) -> Iterator[Score]:
        """Top-1 and top-5 on held-out images after the last epoch.

        The state is saved after each epoch, and gone on from: on a CPU with the same bits as if it had
        never stopped.

        Raises:
            DataError: images without labels; a list that does not fit; no other images to choose on;
                too many that can't be read.
        """
        state = context.state
        tuned_on, *others = self._subsets(context.splits.train, context.seed)
        sets: list[ImageSet] = [context.splits.held_out, *others]
        saved = state.load() or {}
        outcomes: list[Outcome] = saved.get("outcomes", [])
        training_so_far = saved.get("training")
        for rates in self.settings[len(outcomes) :]:
            network, finite = self._tune(context, tuned_on, rates, outcomes, training_so_far)
            tallies = [count_top_hits(network, images, self.view, context.encode_config) for images in sets]
            outcomes = [*outcomes, Outcome(finite=finite, tallies=tallies)]
            training_so_far = None
            state.save({"outcomes": outcomes})
        yield from self._scores(outcomes, tuned_on, context.seed)

    def check(self, splits: Splits) -> None:
        """Raises `DataError` for a list that does not fit, and where no images are left to choose a setting on."""
        self._subsets(splits.train, seed=0)

    def _subsets(self, train: ImageSet, seed: int) -> list[Subset]:
        """The images that are trained on and, where there are several settings, others to choose one on."""
        tuned_on = listed(train, Path(self.list_file)) if self.list_file else stratified(train, self.share, seed=seed)
        if len(self.settings) == 1:
            return [tuned_on]
        taken = set(tuned_on.indices)
        others = [index for index in range(len(train)) if index not in taken]
        if not others:
            raise DataError(
                f"{train.name} {train.split} has no images beyond those that are trained on, so that no setting can "
                "be chosen: give one number in eval.semisup.learning_rates and head_multipliers, or a smaller share"
            )
        indices = [others[place] for place in evenly_spaced(len(others), self.choosing_images)]
        return [tuned_on, Subset(images=train, indices=indices)]

    def _tune(
        self,
        context: Context,
        images: Subset,
        rates: Rates,
        outcomes: Sequence[Outcome],
        training_so_far: dict[str, Any] | None,
    ) -> tuple[Classifier, bool]:
        """The network after the last epoch, and whether loss and weights stayed finite."""
        network = Classifier(copy.deepcopy(context.backbone), len(images.classes), seed=context.seed).to(context.device)
        network.requires_grad_(True)
        groups = [
            {"params": list(network.backbone.parameters()), "lr": rates.learning_rate},
            {"params": list(network.head.parameters()), "lr": rates.learning_rate * rates.head_multiplier},
        ]
        views = TrainingViews(
            images=images,
            view=self.augment,
            batch=self.batch,
            encode_config=context.encode_config,
            seed=context.seed,
        )
        training = FineTuning(
            network,
            torch.optim.SGD(groups, momentum=self.momentum, weight_decay=self.weight_decay),
            parts=lambda first, end: views.parts(
                first, end, f"{rates}, epoch {end // views.steps_per_epoch} of {self.epochs}"
            ),
            loss=lambda batch: views.loss(network, batch),
            length=self.epochs,
            steps_per_unit=views.steps_per_epoch,
            schedule=Milestones(milestones=self.milestone_epochs, gamma=self.gamma),
            synchronized=True,
            seed=context.seed,
            device=context.device,
            bf16=context.encode_config.bf16,
            name=f"fine-tuning on {images.name}, {rates},",
            least_samples=2,  # batch norm knows no variance of one
        )
        if training_so_far:
            training.load_state_dict(training_so_far)
        try:
            for _ in training.spans(every=1):
                context.state.save({"outcomes": outcomes, "training": training.state_dict()})
        except Diverged:
            return network, False
        return network, True

    def _scores(self, outcomes: Sequence[Outcome], tuned_on: Subset, seed: int) -> Iterator[Score]:
        published = "chosen on the images it is reported on, as published" if len(self.settings) > 1 else ""
        # Which line of the table, and by which of the sets the setting of that line is chosen
        variants = [("", published, 0)]
        if len(self.settings) > 1:
            variants.append(
                (CHOSEN_WITHOUT_TEST, f"chosen on {outcomes[0]['tallies'][1][-1]} other training images", 1)
            )
        for variant, choice, chosen_on in variants:
            number = _best(outcomes, chosen_on)
            *hits, n = outcomes[number]["tallies"][0]
            for top, right in zip(TOP, hits, strict=True):
                if top > 1 and top >= len(tuned_on.classes):
                    continue
                yield Score(
                    table="Fine-tuned on 1 % and 10 % of the labels",
                    column=f"{100 * self.share:g} % top-{top}",
                    variant=variant,
                    layer="avgpool",
                    metric=f"top{top}_tuned" if variant else f"top{top}",
                    headline=top == 1 and not variant,
                    value=100 * right / n,
                    n=n,
                    protocol="OpenSelfSup semi_classification",
                    deviations=tuple(self._deviations()),
                    choice=choice,
                    details=self._details(tuned_on, seed, outcomes, number),
                )

    def _details(self, tuned_on: Subset, seed: int, outcomes: Sequence[Outcome], number: int) -> tuple[str, ...]:
        source = f"{self.share:.3g} of each class by seed {seed}"
        if self.list_file:
            source = f"list {Path(self.list_file).name}"
        gone = [str(rates) for rates, of in zip(self.settings, outcomes, strict=True) if not of["finite"]]
        diverged = [f"diverged and ranked last: {' and '.join(gone)}"] if gone else []
        if not outcomes[number]["finite"]:
            diverged = ["diverged: loss or weights are not finite"]
        return (
            f"fine-tuned on {len(tuned_on)} labeled images ({source}, hash {tuned_on.list_hash()})",
            f"{self.settings[number]}" + (f", one of {tried} settings" if (tried := len(self.settings)) > 1 else ""),
            f"momentum {self.momentum:g}",
            f"weight decay {self.weight_decay:g}",
            schedule.describe_schedule(self.epochs, self.milestone_epochs, self.gamma),
            f"batch {self.batch}",
            "batch norm trained",
            f"trained on {self.augment}",
            *diverged,
        )

    def _deviations(self) -> Iterator[str]:
        if not self.list_file:
            yield "the list is ours, not SimCLR's"
        if (tried := len(self.settings)) != _PUBLISHED_SETTINGS:
            yield f"{tried} setting{'s' * (tried > 1)} tried, published is the best of {_PUBLISHED_SETTINGS}"


def _best(outcomes: Sequence[Outcome], place: int) -> int:
    """The setting that is right most often on the set at `place`; those that diverged come last."""
    shares = [(of["finite"], of["tallies"][place][0] / of["tallies"][place][-1]) for of in outcomes]
    return shares.index(max(shares))
