"""VOC07 low-shot SVMs: k positive images and 19k negative ones a class, drawn five times (protocols.md 3.2)."""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from relloc import checks
from relloc.data.image_set import Splits
from relloc.data.lists import DIFFICULT, NOT_THERE, THERE
from relloc.data.views import View, check_view
from relloc.errors import UsageError
from relloc.evals.metrics import ap_area
from relloc.evals.squared_hinge import fit, leading_factor
from relloc.evals.voc07 import Grams, check_usable, class_weights, grams, left_out, presences, usable
from relloc.evaluation.contract import Context, Evaluation
from relloc.results import CHOSEN, LAYERS, Score, closest_to_20
from relloc.seeds import Use, seed_for

_NEGATIVES = 19  # for each positive image
_MOST_GRAM_BYTES = 2**25


@dataclasses.dataclass(frozen=True, kw_only=True)
class Voc07LowShot(Evaluation):
    """Mean average precision after k positive images a class, for each k that every class allows.

    `map_k1` is the mean over the draws at the cost whose mean is best on test, as published, with
    `_std` (of the draws, not of their mean), `_min` and `_max`; `map_k1_cv` is that at the cost which is best on the
    training images that were not drawn. Where the draws leave no positive image there is no such row, and it is said.
    """

    kind = "frozen"
    labels = "presence"
    version = 2
    independent_layers = True
    keeps_features = True

    layers: Sequence[str]
    view: View
    shots: Sequence[int]
    draws: int
    costs: Sequence[float]
    batch: int

    def __post_init__(self) -> None:
        checks.some_of("eval.voc07_low_shot.layers", self.layers, LAYERS)
        check_view("eval.voc07_low_shot.view", self.view)
        checks.wholes("eval.voc07_low_shot.shots", self.shots)
        checks.whole("eval.voc07_low_shot.draws", self.draws)
        checks.numbers("eval.voc07_low_shot.costs", self.costs, above=0)
        checks.whole("eval.voc07_low_shot.batch", self.batch)

    def check(self, splits: Splits) -> None:
        """Raises `UsageError` where no class can be learned and tested, or one has too few images for every k."""
        present, test_present = presences(splits)
        _allowed(present, usable(present, test_present), self.shots)

    def run(self, context: Context) -> Iterator[Score]:
        """Scores of each layer and k. The draws depend on the seed, k and the labels alone.

        Raises:
            UsageError: as `check`, or features are not finite.
        """
        for layer in self.layers:
            known = grams(context.train, context.held_out, layer, self.batch, context.device)
            classes = known.usable
            shots = _allowed(known.present, classes, self.shots)
            factor = leading_factor(known.train)
            deviations = left_out(context.splits.train.classes, classes)
            if missing := sorted(set(self.shots) - set(shots)):
                too_few = f"no k={','.join(map(str, missing))}, for which a class has too few images"
                deviations = (*deviations, too_few)
            for k in shots:
                drawn = draw(known.present, classes, k, self.draws, context.seed)
                on_test, on_rest = self._maps(known, classes, drawn, factor)
                yield from self._scores(
                    Score(
                        table="Low-shot SVM, VOC07 protocol, mAP",
                        column=f"k={k}",
                        layer=layer,
                        metric=f"map_k{k}",
                        headline=k == closest_to_20(shots),
                        value=0.0,  # set for each score
                        n=len(known.test),
                        protocol="3.2",
                        deviations=deviations,
                        details=(
                            f"{self.draws} draws, mean over them",
                            f"draws {_digest(drawn)}",
                            *_not_judged(known.present, classes, k),
                        ),
                    ),
                    on_test,
                    on_rest,
                )

    def _maps(
        self, known: Grams, classes: Sequence[int], drawn: Int[Tensor, "chosen draws s"], factor: Float[Tensor, "n r"]
    ) -> tuple[Float[Tensor, "draws costs"], Float[Tensor, "draws costs"]]:
        """Mean average precision in percent on test, and on the training images that were not drawn."""
        coefficients = self._fit(known, drawn.flatten(0, 1), factor)  # (classes x draws, n, costs)
        shape = (len(classes), self.draws, -1, len(self.costs))
        by_class = coefficients.view(*shape).permute(2, 0, 1, 3).flatten(2)  # (n, classes, draws x costs)
        test = (known.test @ by_class.flatten(1)).view(len(known.test), len(classes), -1)
        rest = (known.train @ by_class.flatten(1)).view(len(known.train), len(classes), -1)
        on_test = known.test_map(test, classes)
        on_rest = 100 * _rest_precision(rest, known.present[:, list(classes)].to(rest.device), drawn, len(self.costs))
        return on_test.view(self.draws, -1), on_rest.view(self.draws, -1)

    def _fit(self, known: Grams, drawn: Int[Tensor, "p s"], factor: Float[Tensor, "n r"]) -> Float[Tensor, "p n costs"]:
        """Coefficients of each draw's SVMs among all n training images, costs as listed."""
        n, size = len(known.train), drawn.shape[1]
        found = known.train.new_zeros(len(drawn), n, len(self.costs))
        for some_draws in torch.arange(len(drawn)).split(max(1, _MOST_GRAM_BYTES // (8 * size * size))):
            rows = drawn[some_draws].to(known.train.device)
            some = self._fit_some(known.train[rows.unsqueeze(2), rows.unsqueeze(1)], factor[rows])
            found[some_draws] = found[some_draws].scatter(1, rows.unsqueeze(2).expand_as(some), some)
        return found

    def _fit_some(self, gram: Float[Tensor, "p s s"], factor: Float[Tensor, "p s r"]) -> Float[Tensor, "p s costs"]:
        positive = torch.arange(gram.shape[1], device=gram.device) < gram.shape[1] // (1 + _NEGATIVES)
        signs = torch.where(positive, 1.0, -1.0).double().view(1, -1, 1).expand(len(gram), -1, len(self.costs))
        costs = torch.tensor(list(self.costs), dtype=torch.float64, device=gram.device)
        weights = (class_weights(positive).unsqueeze(1) * costs).expand_as(signs)
        return fit(gram, signs, weights, factor=factor).coefficients

    def _scores(
        self, blank: Score, on_test: Float[Tensor, "draws costs"], on_rest: Float[Tensor, "draws costs"]
    ) -> Iterator[Score]:
        """`blank` with each value."""
        best = int(on_test.mean(dim=0).argmax())
        values = on_test[:, best]
        choice = f"cost {self.costs[best]:g} of {len(self.costs)} chosen on test as published"
        published = dataclasses.replace(blank, value=float(values.mean()), choice=choice)
        yield published
        spread = {"std": values.std(correction=0), "min": values.min(), "max": values.max()}
        for name, value in spread.items():
            as_detail = {"table": "", "variant": f"{name} over draws", "headline": False}
            yield dataclasses.replace(published, **as_detail, metric=f"{blank.metric}_{name}", value=float(value))
        if not on_rest.isnan().any():  # else every class is: each draw of a class leaves as many of its images
            chosen = int(on_rest.mean(dim=0).argmax())
            choice = f"cost {self.costs[chosen]:g} of {len(self.costs)} chosen on the training images not drawn"
            yield dataclasses.replace(
                blank,
                metric=f"{blank.metric}_cv",
                variant=CHOSEN,
                headline=False,
                value=float(on_test[:, chosen].mean()),
                choice=choice,
            )


def _allowed(present: Int[Tensor, "n classes"], classes: Sequence[int], shots: Sequence[int]) -> list[int]:
    check_usable("eval.voc07_low_shot", classes)
    positive, negative = ((present[:, list(classes)] == mark).sum(dim=0) for mark in (THERE, NOT_THERE))
    most = min(int(positive.min()), int(negative.min()) // _NEGATIVES)
    allowed = [k for k in shots if k <= most]
    if not allowed:
        raise UsageError(
            f"eval.voc07_low_shot.shots={list(shots)}: a class has only {int(positive.min())} positive images and one "
            f"{int(negative.min())} negative ones, of which k needs {_NEGATIVES} times as many: name smaller k"
        )
    return allowed


def _not_judged(present: Int[Tensor, "n classes"], classes: Sequence[int], k: int) -> Iterator[str]:
    """Words on classes all of whose positive images every draw takes, so that no cost is judged by them."""
    used_up = int(((present[:, list(classes)] == THERE).sum(dim=0) == k).sum())
    if used_up == len(classes):
        yield "no cost chosen without the test set, as draws leave no positive image"
    elif used_up:
        yield f"{used_up} of {len(classes)} classes have no positive image left to choose a cost by"


def draw(
    present: Int[Tensor, "n classes"], classes: Sequence[int], k: int, draws: int, seed: int
) -> Int[Tensor, "chosen draws s"]:
    """k images with each class, then 19k without it, drawn anew each time; difficult ones are neither.

    Depends on (seed, class number, k, draw) and the labels, on nothing else that is drawn.
    """
    found = []
    for c in classes:
        sides = [(present[:, c] == mark).nonzero().squeeze(1) for mark in (THERE, NOT_THERE)]
        for number in range(draws):
            generator = torch.Generator().manual_seed(seed_for(Use.LOW_SHOT_IMAGES, seed, c, k, number))
            mixed = [side[torch.randperm(len(side), generator=generator)] for side in sides]
            found.append(torch.cat([mixed[0][:k], mixed[1][: _NEGATIVES * k]]))
    return torch.stack(found).view(len(classes), draws, -1)


def _digest(drawn: Int[Tensor, "chosen draws s"]) -> str:
    return hashlib.sha256(drawn.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


def _rest_precision(
    scores: Float[Tensor, "n classes m"], present: Int[Tensor, "n classes"], drawn: Tensor, n_costs: int
) -> Float[Tensor, "m"]:
    """Mean over classes of average precision on the training images of a class that its draw left; 0 to 1."""
    drawn = drawn.to(scores.device)
    taken = torch.zeros(*present.shape, drawn.shape[1], dtype=torch.bool, device=scores.device)
    taken.scatter_(0, drawn.permute(2, 0, 1), torch.ones_like(drawn.permute(2, 0, 1), dtype=torch.bool))
    counted = ~taken.repeat_interleave(n_costs, dim=2) & (present != DIFFICULT).unsqueeze(2)
    positive = (present == THERE).unsqueeze(2).expand_as(scores)
    flat = [part.reshape(len(scores), -1) for part in (scores, positive, counted)]
    return ap_area(*flat).view(present.shape[1], -1).nanmean(dim=0)
