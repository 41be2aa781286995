"""Linear classifiers on frozen features, trained in one pass (protocols.md 3.3 to 3.6).

`Linear` trains on random views, which are encoded anew in each epoch; `LinearFast` trains on one
fixed view, whose features are computed once.
"""

import abc
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from relloc import checks
from relloc.data.views import View, check_cut_view, check_view
from relloc.errors import DataError
from relloc.evals.heads import HeadSettings, LayerHeads, Sgd
from relloc.evals.training import (
    HeadTraining,
    TrainedHeads,
    count_hits,
    draw_held_back,
    have_diverged,
)
from relloc.evaluation import schedule
from relloc.evaluation.contract import Context, Evaluation
from relloc.features.source import ColorAugmentation, FeatureSource
from relloc.results import CHOSEN_WITHOUT_TEST, Score

_DIVERGED = "diverged: weights are not finite"
# Ranks of heads that must not be chosen, below any number of right answers.
_RANK_OF_DIVERGED = -1
_RANK_OF_UNFAIR = -2


class _LinearEvaluation(Evaluation):
    """Base class of both evaluations, which have these hyperparameters as fields of their own."""

    kind = "frozen"
    labels = "class"
    may_decode_on_device = True
    # Raised where numbers of an earlier version would not be equal, so that they are measured
    # again.
    version = 2

    epochs: int
    milestone_epochs: Sequence[int]
    gamma: float
    momentum: float
    nesterov: bool
    batch_norm: bool

    @abc.abstractmethod
    def _settings(self) -> list[HeadSettings]:
        """Returns the hyperparameters of the heads of a layer."""

    def _training(self) -> HeadTraining:
        """Returns the training of all heads."""
        sgd = Sgd(
            settings=tuple(self._settings()),
            momentum=self.momentum,
            nesterov=self.nesterov,
        )
        return HeadTraining(
            layers=self.layers,
            sgd=sgd,
            epochs=self.epochs,
            milestone_epochs=self.milestone_epochs,
            gamma=self.gamma,
            batch=self.batch,
            batch_norm=self.batch_norm,
        )

    def _train(
        self,
        source: FeatureSource,
        context: Context,
        watched: FeatureSource | None = None,
    ) -> tuple[TrainedHeads, dict[str, int]]:
        """Trains all heads on `source`, and chooses one per layer by the held-back tenth.

        Returns the heads, and for each layer the index of the head with the most right answers on
        the tenth, which is seen in the still view; 0 if all heads trained on the tenth, so that
        there is nothing to choose. `watched` are images to measure the best epoch on.
        """
        # The same tenth for the same seed, so that candidates of several runs compare.
        tenth = draw_held_back(context.train.n, context.seed)
        trained = self._training().fit(
            source,
            context,
            tenth=tenth,
            watched=watched,
        )
        if all(setting.sees_all for setting in self._settings()):
            return trained, dict.fromkeys(self.layers, 0)
        # Chosen by images that none of the candidates trained on, in the view that is measured.
        hits, _ = count_hits(
            trained.heads,
            context.train,
            tenth,
            self.batch,
            context.device,
        )
        chosen = {}
        for layer, heads in trained.heads.items():
            chosen[layer] = _best_head(hits[layer], heads)
        return trained, chosen

    def _count_held_out_hits(
        self,
        trained: TrainedHeads,
        context: Context,
    ) -> tuple[dict[str, Int[Tensor, "heads"]], int]:
        """Returns the right answers of each head on held-out images, and the number of images.

        Raises:
            DataError: none of the images can be read.
        """
        # All heads of all layers are counted in one pass over the images.
        held_out = context.held_out
        indices = torch.arange(held_out.n)
        hits, n_images = count_hits(
            trained.heads,
            held_out,
            indices,
            self.batch,
            context.device,
        )
        # Some unreadable images are reported; a share of none can't be.
        if not n_images:
            raise DataError(
                "none of the images to report on can be read: "
                "repair them, or evaluate on another data set"
            )
        return hits, n_images

    def _describe_head(self, head: int) -> tuple[str, ...]:
        """Returns the hyperparameters of a head in words, for the details of its score."""
        setting = self._settings()[head]
        # SGD's other kind of momentum is the usual one, and is not named.
        kind = "nesterov " if self.nesterov else ""
        return (
            f"lr {setting.lr:g}",
            f"weight decay {setting.weight_decay:g}",
            f"{kind}momentum {self.momentum:g}",
            schedule.describe_schedule(self.epochs, self.milestone_epochs, self.gamma),
            f"batch {self.batch}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(_LinearEvaluation):
    """A linear classifier per layer as published, and a grid of others trained in the same pass.

    The published one (`lr`, `weight_decay`) trains on all training images, in random views by
    `augment` and `color` that are new in each epoch. It yields `top1`, measured after the last
    epoch, and with `best_epoch` also `top1_best`, measured after the epoch that is best on val.

    The grid has a classifier for each of `grid_lrs` with each of `grid_weight_decays`. It never
    trains on a tenth of the training images, which, in the still `view`, choose the setting of each
    layer. The chosen one yields `top1_tuned`, measured on val after the last epoch.

    `layers`: the layers to measure. `view`: how images are cropped and resized for measuring, and
    for training too if `augment` is None. `follows` names the protocol in words, `protocol` by its
    id. `table`: the title of the table of its results. `epochs`: the length of the training.
    `gamma`: what the learning rate is multiplied by after each of `milestone_epochs`.
    `momentum`, `nesterov`, `batch`: hyperparameters of SGD, which all classifiers share.
    `batch_norm`: whether features are normalized by a batch norm without scale and shift.

    Raises:
        ValueError: hyperparameters with which nothing could be trained.
    """

    # The order of these fields enters the repr, which is hashed to recognize results: keep it.
    layers: Sequence[str]
    view: View
    follows: str
    # Not in the repr, which is hashed to recognize results: these decide no number.
    protocol: str = dataclasses.field(default="3.3", repr=False)
    table: str = dataclasses.field(default="Linear, top-1", repr=False)
    augment: View | None = None
    color: ColorAugmentation | None = None
    epochs: int
    milestone_epochs: Sequence[int]
    gamma: float
    lr: float
    weight_decay: float
    momentum: float
    nesterov: bool
    batch: int
    batch_norm: bool
    grid_lrs: Sequence[float] = ()
    grid_weight_decays: Sequence[float] = ()
    best_epoch: bool = False

    def __post_init__(self) -> None:
        self.check_inputs("eval.linear")
        if self.augment is not None:
            check_view("eval.linear.augment", self.augment)
        for name in ("nesterov", "batch_norm", "best_epoch"):
            checks.true_or_false(f"eval.linear.{name}", getattr(self, name))
        schedule.check_sgd_settings("eval.linear", self, batch_norm=self.batch_norm)
        checks.number("eval.linear.lr", self.lr, above=0)
        checks.numbers(
            "eval.linear.grid_lrs",
            self.grid_lrs,
            above=0,
            may_be_empty=True,
        )
        checks.numbers(
            "eval.linear.grid_weight_decays",
            self.grid_weight_decays,
            at_least=0,
            may_be_empty=True,
        )
        # One of the two alone would make an empty grid.
        if bool(self.grid_lrs) != bool(self.grid_weight_decays):
            raise ValueError(
                "eval.linear: give both grid_lrs and grid_weight_decays, or neither ([])"
            )
        if self.color and not self.augment:
            raise ValueError(
                "eval.linear.color needs eval.linear.augment: still views are not colored"
            )

    def check_cut_views(self, setting: str) -> None:
        super().check_cut_views(setting)
        if self.augment is not None:
            check_cut_view(f"{setting}.augment", self.augment)

    def run(self, context: Context) -> Iterator[Score]:
        """Yields top1 of each layer, and top1_best and top1_tuned where asked for.

        All are measured on held-out images.

        Raises:
            UsageError: features are not finite.
            DataError: images cannot be read, or are too few.
        """
        # The same images either way; random views are encoded anew in each epoch.
        source = context.train
        if self.augment:
            source = context.augmented(self.augment, self.color)
        # Measuring after each epoch takes time: only where the published choice is asked for.
        watched = context.held_out if self.best_epoch else None
        trained, chosen = self._train(source, context, watched=watched)
        hits, n_images = self._count_held_out_hits(trained, context)
        for layer in self.layers:
            diverged = have_diverged(trained.heads[layer])
            # The published head is the first one.
            last = Score(
                table=self.table,
                column=layer,
                variant="last epoch" if self.best_epoch else "",
                layer=layer,
                metric="top1",
                headline=True,
                value=100 * int(hits[layer][0]) / n_images,
                n=n_images,
                protocol=self.protocol,
                deviations=self._deviations(),
                details=(*self._details(0, diverged), "last epoch"),
            )
            yield last
            # A number that is chosen on the images that it is reported on, as the protocol does it.
            if self.best_epoch:
                yield dataclasses.replace(
                    last,
                    metric="top1_best",
                    variant="",
                    headline=False,
                    value=100 * trained.best[layer] / n_images,
                    choice="best epoch on val, as published",
                    details=self._details(0, diverged),
                )
            # A number whose hyperparameters were chosen without them.
            if self.grid_lrs:
                head = chosen[layer]
                yield dataclasses.replace(
                    last,
                    metric="top1_tuned",
                    variant=CHOSEN_WITHOUT_TEST,
                    headline=False,
                    value=100 * int(hits[layer][head]) / n_images,
                    deviations=(),
                    choice=self._choice(),
                    details=(*self._details(head, diverged), "last epoch"),
                )

    def _settings(self) -> list[HeadSettings]:
        # The published head comes first: `run` reports it by this index.
        settings = [HeadSettings(lr=self.lr, weight_decay=self.weight_decay, sees_all=True)]
        # The heads of the grid never see the tenth that chooses among them.
        for lr, decay in itertools.product(self.grid_lrs, self.grid_weight_decays):
            settings.append(HeadSettings(lr=lr, weight_decay=decay, sees_all=False))
        return settings

    def _details(
        self,
        head: int,
        diverged: Bool[Tensor, "heads"],
    ) -> tuple[str, ...]:
        """Returns in words how a head was trained, and whether it diverged."""
        views = [str(part) for part in (self.augment, self.color) if part]
        training_views = ", ".join(views) or "the still view"
        # The id of the protocol has a field of its own in the results.
        details = [
            self.follows.removeprefix(f"{self.protocol} "),
            *self._describe_head(head),
            f"trained on {training_views}",
        ]
        if diverged[head]:
            details.append(_DIVERGED)
        return tuple(details)

    def _deviations(self) -> tuple[str, ...]:
        """Returns what differs for the published head if there is a grid.

        The grid must not see the tenth, so batches cannot mix its images with others.
        """
        if not self.grid_lrs:
            return ()
        return (
            "a batch is all of the held-back tenth or all of the rest, published ones are uniform",
        )

    def _choice(self) -> str:
        """Returns in words how the head of the grid was chosen."""
        n_settings = len(self.grid_lrs) * len(self.grid_weight_decays)
        # The published head trains on the tenth, and all heads of a layer share one batch norm.
        norm = ", whose images enter batch norm" if self.batch_norm else ""
        return (
            f"chosen among {n_settings} on a held-back tenth of train in the still view, "
            f"not trained on{norm}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearFast(_LinearEvaluation):
    """Linear classifiers on features that are computed once, in one view without augmentation.

    With one learning rate, all training images are trained on. With several, a random tenth of them
    is not trained on and chooses the rate of each layer. Val only reports.

    `layers`: the layers to measure. `view`: how images are cropped and resized.
    `epochs`: the length of the training. `gamma`: what the learning rate is multiplied by after
    each of `milestone_epochs`. `learning_rates`: the rates to choose from. `momentum`,
    `weight_decay`, `batch`: further hyperparameters of SGD.

    Raises:
        ValueError: hyperparameters with which nothing could be trained.
    """

    # As in the published protocol; not fields, so that they cannot be changed.
    nesterov = True
    batch_norm = True
    # Read once per epoch, so computing them again each time would take most of the time.
    keeps_features = True

    layers: Sequence[str]
    view: View
    epochs: int
    milestone_epochs: Sequence[int]
    gamma: float
    learning_rates: Sequence[float]  # one head per rate and layer
    momentum: float
    weight_decay: float
    batch: int

    def __post_init__(self) -> None:
        self.check_inputs("eval.linear_fast")
        schedule.check_sgd_settings("eval.linear_fast", self, batch_norm=True)
        checks.numbers("eval.linear_fast.learning_rates", self.learning_rates, above=0)

    def run(self, context: Context) -> Iterator[Score]:
        """Yields one score per layer: top1 on held-out images after the last epoch.

        Raises:
            UsageError: features are not finite.
            DataError: images cannot be read, or are too few.
        """
        # Rates are chosen on the held-back tenth; held-out images are counted afterwards.
        trained, chosen = self._train(context.train, context)
        hits, n_images = self._count_held_out_hits(trained, context)
        n_rates = len(self.learning_rates)
        choice = ""
        if n_rates > 1:
            choice = f"rate chosen among {n_rates} on a held-back random tenth of train"
        for layer in self.layers:
            head = chosen[layer]
            details = ["one head a stage", *self._describe_head(head)]
            if have_diverged(trained.heads[layer])[head]:
                details.append(_DIVERGED)
            yield Score(
                table="Linear on features computed once, top-1",
                column=layer,
                layer=layer,
                metric="top1",
                headline=True,
                value=100 * int(hits[layer][head]) / n_images,
                n=n_images,
                protocol="3.3",
                deviations=("one fixed center view, features computed once",),
                choice=choice,
                details=tuple(details),
            )

    def _settings(self) -> list[HeadSettings]:
        # A single rate needs no images to choose it by.
        sees_all = len(self.learning_rates) == 1
        settings = []
        for lr in self.learning_rates:
            settings.append(HeadSettings(lr=lr, weight_decay=self.weight_decay, sees_all=sees_all))
        return settings


def _best_head(hits: Int[Tensor, "heads"], heads: LayerHeads) -> int:
    """Returns the head with the most right answers on the tenth, the first of them on a tie.

    Heads that trained on the tenth are never chosen, and diverged ones only if there is no other.
    """
    sees_all = torch.tensor([setting.sees_all for setting in heads.sgd.settings])
    # Diverged first: a head that both diverged and saw the tenth has the lower of the two ranks.
    ranked = hits.masked_fill(have_diverged(heads), _RANK_OF_DIVERGED)
    ranked = ranked.masked_fill(sees_all, _RANK_OF_UNFAIR)
    # Of equal numbers of right answers, argmax takes the first head.
    return int(ranked.argmax())
