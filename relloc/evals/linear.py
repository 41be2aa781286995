"""Linear classifiers on frozen features, all layers and settings in one pass (protocols.md 3.3 to 3.6)."""

import abc
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from relloc import checks
from relloc.data.views import View, check_view
from relloc.errors import DataError
from relloc.evals.heads import LayerHeads, Setting, Sgd
from relloc.evals.training import Trained, Training, count_hits, have_diverged, held_back
from relloc.evaluation import schedule
from relloc.evaluation.contract import Context, Evaluation
from relloc.features.source import Color, FeatureSource
from relloc.results import CHOSEN_WITHOUT_TEST, Score

_DIVERGED = "diverged: weights are not finite"


class _Trained(Evaluation):
    """What both evaluations do alike; their constants are fields of their own."""

    kind = "frozen"
    labels = "class"
    version = 2

    epochs: int
    milestone_epochs: Sequence[int]
    gamma: float
    momentum: float
    nesterov: bool
    batch_norm: bool

    @abc.abstractmethod
    def _settings(self) -> list[Setting]:
        """Those of the heads of a layer."""

    def _training(self) -> Training:
        return Training(
            layers=self.layers,
            sgd=Sgd(settings=tuple(self._settings()), momentum=self.momentum, nesterov=self.nesterov),
            epochs=self.epochs,
            milestone_epochs=self.milestone_epochs,
            gamma=self.gamma,
            batch=self.batch,
            batch_norm=self.batch_norm,
        )

    def _train(
        self, source: FeatureSource, context: Context, watched: FeatureSource | None = None
    ) -> tuple[Trained, dict[str, int]]:
        """Trained heads, and which of a layer is right most often on the tenth; 0 where all heads trained on it."""
        tenth = held_back(context.train.n, context.seed)
        trained = self._training().fit(source, context, tenth=tenth, watched=watched)
        if all(setting.sees_all for setting in self._settings()):
            return trained, dict.fromkeys(self.layers, 0)
        hits, _ = count_hits(trained.heads, context.train, tenth, self.batch, context.device)
        return trained, {layer: _best(hits[layer], heads) for layer, heads in trained.heads.items()}

    def _hits(self, trained: Trained, context: Context) -> tuple[dict[str, Int[Tensor, "heads"]], int]:
        """Right answers of each head on held-out images, and how many these are. Raises `DataError` for none."""
        held_out = context.held_out
        hits, seen = count_hits(trained.heads, held_out, torch.arange(held_out.n), self.batch, context.device)
        if not seen:
            raise DataError("none of the images to report on can be read")
        return hits, seen

    def _constants(self, head: int) -> tuple[str, ...]:
        setting = self._settings()[head]
        return (
            f"lr {setting.lr:g}",
            f"weight decay {setting.weight_decay:g}",
            f"{'nesterov ' if self.nesterov else ''}momentum {self.momentum:g}",
            schedule.describe_schedule(self.epochs, self.milestone_epochs, self.gamma),
            f"batch {self.batch}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(_Trained):
    """A linear classifier a layer as published, and a grid of others trained in the same pass.

    The published one (`lr`, `weight_decay`) trains on all training images in the views `augment`
    and `color` make, new ones each epoch; its last epoch is `top1`, its best on val, where
    `best_epoch` asks for it, `top1_best`. The grid, each of `grid_lrs` with each of
    `grid_weight_decays`, never trains on a tenth of the training images, which in the still `view`
    choose the setting of each layer; val only reports it, as `top1_tuned`, after the last epoch.
    `follows` names the protocol in words, `protocol` by its id; `table` is the title of the table of its results.

    Raises:
        ValueError: constants that would train nothing.
    """

    layers: Sequence[str]
    view: View
    follows: str
    # The fingerprint is of the repr, and these decide no number
    protocol: str = dataclasses.field(default="3.3", repr=False)
    table: str = dataclasses.field(default="Linear, top-1", repr=False)
    augment: View | None = None
    color: Color | None = None
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
        checks.numbers("eval.linear.grid_lrs", self.grid_lrs, above=0, may_be_empty=True)
        checks.numbers("eval.linear.grid_weight_decays", self.grid_weight_decays, at_least=0, may_be_empty=True)
        if bool(self.grid_lrs) != bool(self.grid_weight_decays):
            raise ValueError("eval.linear: give both grid_lrs and grid_weight_decays, or neither ([])")
        if self.color and not self.augment:
            raise ValueError("eval.linear.color needs eval.linear.augment: still views are not colored")

    def run(self, context: Context) -> Iterator[Score]:
        """Scores on held-out images by layer: top1, and top1_best and top1_tuned where asked for.

        Raises:
            UsageError: features that are not finite.
            DataError: images that can't be read, or too few.
        """
        source = context.augmented(self.augment, self.color) if self.augment else context.train
        trained, chosen = self._train(source, context, watched=context.held_out if self.best_epoch else None)
        hits, seen = self._hits(trained, context)
        for layer in self.layers:
            gone = have_diverged(trained.heads[layer])
            last = Score(
                table=self.table,
                column=layer,
                variant="last epoch" if self.best_epoch else "",
                layer=layer,
                metric="top1",
                headline=True,
                value=100 * int(hits[layer][0]) / seen,
                n=seen,
                protocol=self.protocol,
                deviations=self._how_mixed(),
                details=(*self._details(0, gone), "last epoch"),
            )
            yield last
            if self.best_epoch:
                yield dataclasses.replace(
                    last,
                    metric="top1_best",
                    variant="",
                    headline=False,
                    value=100 * trained.best[layer] / seen,
                    choice="best epoch on val, as published",
                    details=self._details(0, gone),
                )
            if self.grid_lrs:
                yield dataclasses.replace(
                    last,
                    metric="top1_tuned",
                    variant=CHOSEN_WITHOUT_TEST,
                    headline=False,
                    value=100 * int(hits[layer][chosen[layer]]) / seen,
                    deviations=(),
                    choice=self._how_chosen(),
                    details=(*self._details(chosen[layer], gone), "last epoch"),
                )

    def _settings(self) -> list[Setting]:
        grid = itertools.product(self.grid_lrs, self.grid_weight_decays)
        published = Setting(lr=self.lr, weight_decay=self.weight_decay, sees_all=True)
        return [published, *(Setting(lr=lr, weight_decay=decay, sees_all=False) for lr, decay in grid)]

    def _details(self, head: int, gone: Tensor) -> tuple[str, ...]:
        seen = ", ".join(str(part) for part in (self.augment, self.color) if part) or "the still view"
        name = self.follows.removeprefix(f"{self.protocol} ")
        return (name, *self._constants(head), f"trained on {seen}", *([_DIVERGED] if gone[head] else []))

    def _how_mixed(self) -> tuple[str, ...]:
        """What differs for the published head where heads train beside it that must not see the tenth."""
        unlike = "a batch is all of the held-back tenth or all of the rest, published ones are uniform"
        return (unlike,) if self.grid_lrs else ()

    def _how_chosen(self) -> str:
        many = len(self.grid_lrs) * len(self.grid_weight_decays)
        norm = ", whose images enter batch norm" if self.batch_norm else ""
        return f"chosen among {many} on a held-back tenth of train in the still view, not trained on{norm}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearFast(_Trained):
    """The same classifiers on features that are computed once: a fixed view, no augmentation.

    With one learning rate all training images train. With several, a random tenth is held back to
    choose the rate of each layer, and is not trained on; val only reports.

    Raises:
        ValueError: constants that would train nothing.
    """

    nesterov = True
    batch_norm = True
    keeps_features = True

    layers: Sequence[str]
    view: View
    epochs: int
    milestone_epochs: Sequence[int]
    gamma: float
    learning_rates: Sequence[float]
    momentum: float
    weight_decay: float
    batch: int

    def __post_init__(self) -> None:
        self.check_inputs("eval.linear_fast")
        schedule.check_sgd_settings("eval.linear_fast", self, batch_norm=True)
        checks.numbers("eval.linear_fast.learning_rates", self.learning_rates, above=0)

    def run(self, context: Context) -> Iterator[Score]:
        """Top-1 of the last epoch on held-out images, one score a layer. Raises as `Linear`."""
        trained, chosen = self._train(context.train, context)
        hits, seen = self._hits(trained, context)
        n_rates = len(self.learning_rates)
        choice = f"rate chosen among {n_rates} on a held-back random tenth of train" if n_rates > 1 else ""
        for layer in self.layers:
            head = chosen[layer]
            diverged = [_DIVERGED] if have_diverged(trained.heads[layer])[head] else []
            yield Score(
                table="Linear on features computed once, top-1",
                column=layer,
                layer=layer,
                metric="top1",
                headline=True,
                value=100 * int(hits[layer][head]) / seen,
                n=seen,
                protocol="3.3",
                deviations=("one fixed center view, features computed once",),
                choice=choice,
                details=("one head a stage", *self._constants(head), *diverged),
            )

    def _settings(self) -> list[Setting]:
        every = len(self.learning_rates) == 1
        return [Setting(lr=lr, weight_decay=self.weight_decay, sees_all=every) for lr in self.learning_rates]


def _best(hits: Int[Tensor, "heads"], heads: LayerHeads) -> int:
    not_ranked = have_diverged(heads)
    seen = torch.tensor([setting.sees_all for setting in heads.sgd.settings])
    return int(hits.masked_fill(not_ranked, -1).masked_fill(seen, -2).argmax())
