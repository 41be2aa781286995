"""Linear classifiers on frozen features, all layers and settings in one pass (protocols.md 3.3 to 3.6)."""

import dataclasses
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
from relloc.features.source import Color
from relloc.results import CHOSEN, LAYERS, Score

_DIVERGED = "diverged: weights are not finite"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(Evaluation):
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

    kind = "frozen"
    labels = "class"
    version = 2

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
        checks.some_of("eval.linear.layers", self.layers, LAYERS)
        check_view("eval.linear.view", self.view)
        if self.augment is not None:
            check_view("eval.linear.augment", self.augment)
        for name in ("nesterov", "batch_norm", "best_epoch"):
            checks.true_or_false(f"eval.linear.{name}", getattr(self, name))
        schedule.check_training("eval.linear", self, batch_norm=self.batch_norm)
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
        tenth = held_back(context.train.n, context.seed)
        source = context.augmented(self.augment, self.color) if self.augment else context.train
        watched = context.held_out if self.best_epoch else None
        trained = self._training().fit(source, context, tenth=tenth, watched=watched)
        chosen = _chosen(trained, context, tenth, self.batch) if self.grid_lrs else {}
        hits, seen = _all_hits(trained, context, self.batch)
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
            if chosen:
                yield dataclasses.replace(
                    last,
                    metric="top1_tuned",
                    variant=CHOSEN,
                    headline=False,
                    value=100 * int(hits[layer][chosen[layer]]) / seen,
                    deviations=(),
                    choice=self._how_chosen(),
                    details=(*self._details(chosen[layer], gone), "last epoch"),
                )

    def _training(self) -> Training:
        return Training(
            layers=self.layers,
            sgd=Sgd(settings=self._settings(), momentum=self.momentum, nesterov=self.nesterov),
            epochs=self.epochs,
            milestone_epochs=self.milestone_epochs,
            gamma=self.gamma,
            batch=self.batch,
            batch_norm=self.batch_norm,
        )

    def _settings(self) -> tuple[Setting, ...]:
        grid = [
            Setting(lr=lr, weight_decay=decay, sees_all=False)
            for lr in self.grid_lrs
            for decay in self.grid_weight_decays
        ]
        return (Setting(lr=self.lr, weight_decay=self.weight_decay, sees_all=True), *grid)

    def _details(self, head: int, gone: Tensor) -> tuple[str, ...]:
        seen = ", ".join(str(part) for part in (self.augment, self.color) if part) or "the still view"
        name = self.follows.removeprefix(f"{self.protocol} ")
        return (name, *_constants(self._training(), head), f"trained on {seen}", *([_DIVERGED] if gone[head] else []))

    def _how_mixed(self) -> tuple[str, ...]:
        """What differs for the published head where heads train beside it that must not see the tenth."""
        unlike = "a batch is all of the held-back tenth or all of the rest, published ones are uniform"
        return (unlike,) if self.grid_lrs else ()

    def _how_chosen(self) -> str:
        many = len(self.grid_lrs) * len(self.grid_weight_decays)
        norm = ", whose images enter batch norm" if self.batch_norm else ""
        return f"chosen among {many} on a held-back tenth of train in the still view, not trained on{norm}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearFast(Evaluation):
    """The same classifiers on features that are computed once: a fixed view, no augmentation.

    With one learning rate all training images train. With several, a random tenth is held back to
    choose the rate of each layer, and is not trained on; val only reports.

    Raises:
        ValueError: constants that would train nothing.
    """

    kind = "frozen"
    labels = "class"
    version = 2
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
        checks.some_of("eval.linear_fast.layers", self.layers, LAYERS)
        check_view("eval.linear_fast.view", self.view)
        schedule.check_training("eval.linear_fast", self, batch_norm=True)
        checks.numbers("eval.linear_fast.learning_rates", self.learning_rates, above=0)

    def run(self, context: Context) -> Iterator[Score]:
        """Top-1 of the last epoch on held-out images, one score a layer. Raises as `Linear`."""
        tenth = held_back(context.train.n, context.seed)
        trained = self._training().fit(context.train, context, tenth=tenth, watched=None)
        several = len(self.learning_rates) > 1
        chosen = _chosen(trained, context, tenth, self.batch) if several else dict.fromkeys(self.layers, 0)
        hits, seen = _all_hits(trained, context, self.batch)
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
                choice=f"rate chosen among {len(self.learning_rates)} on a held-back random tenth of train"
                if several
                else "",
                details=("one head a stage", *_constants(self._training(), head), *diverged),
            )

    def _training(self) -> Training:
        every = len(self.learning_rates) == 1
        settings = [Setting(lr=lr, weight_decay=self.weight_decay, sees_all=every) for lr in self.learning_rates]
        return Training(
            layers=self.layers,
            sgd=Sgd(settings=tuple(settings), momentum=self.momentum, nesterov=True),
            epochs=self.epochs,
            milestone_epochs=self.milestone_epochs,
            gamma=self.gamma,
            batch=self.batch,
            batch_norm=True,
        )


def _constants(training: Training, head: int) -> tuple[str, ...]:
    setting, sgd = training.sgd.settings[head], training.sgd
    return (
        f"lr {setting.lr:g}",
        f"weight decay {setting.weight_decay:g}",
        f"{'nesterov ' if sgd.nesterov else ''}momentum {sgd.momentum:g}",
        schedule.in_words(training.epochs, training.milestone_epochs, training.gamma),
        f"batch {training.batch}",
    )


def _chosen(trained: Trained, context: Context, tenth: Int[Tensor, "m"], size: int) -> dict[str, int]:
    """The head of each layer that is right most often on the tenth it was not trained on; diverged ones come last."""
    hits, _ = count_hits(trained.heads, context.train, tenth, size, context.device)
    return {layer: _best(hits[layer], heads) for layer, heads in trained.heads.items()}


def _best(hits: Int[Tensor, "heads"], heads: LayerHeads) -> int:
    not_ranked = have_diverged(heads)
    seen = torch.tensor([setting.sees_all for setting in heads.sgd.settings])
    return int(hits.masked_fill(not_ranked, -1).masked_fill(seen, -2).argmax())


def _all_hits(trained: Trained, context: Context, size: int) -> tuple[dict[str, Int[Tensor, "heads"]], int]:
    held_out = context.held_out
    hits, seen = count_hits(trained.heads, held_out, torch.arange(held_out.n), size, context.device)
    if not seen:
        raise DataError("none of the images to report on can be read")
    return hits, seen
