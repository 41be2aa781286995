"""VOC07 low-shot SVMs: k positive images and 19k negative ones a class, drawn five times (protocols.md 3.2)."""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from relloc import checks
from relloc.data.lists import DIFFICULT, NOT_THERE, THERE
from relloc.data.views import View
from relloc.errors import UsageError
from relloc.evals.metrics import ap_area
from relloc.evals.squared_hinge import fit, leading_factor
from relloc.evals.voc07 import Grams, Presence, Shown, Voc07, class_weights
from relloc.evaluation.contract import Context
from relloc.results import CHOSEN_WITHOUT_TEST, Score, closest_to_20
from relloc.seeds import Use, seed_for

_NEGATIVES = 19  # for each positive image
_MOST_GRAM_BYTES = 2**25

Drawn = Int[Tensor, "chosen draws s"]  # the images of each draw, positive ones first


@dataclasses.dataclass(frozen=True, kw_only=True)
class Voc07LowShot(Voc07):
    """Mean average precision after k positive images a class, for each k that every class allows.

    `map_k1` is the mean over the draws at the cost whose mean is best on test, as published, with
    `_std` (of the draws, not of their mean), `_min` and `_max`; `map_k1_cv` is that at the cost which is best on the
    training images that were not drawn. Where the draws leave no positive image there is no such row, and it is said.
    """

    setting = "eval.voc07_low_shot"
    version = 2

    layers: Sequence[str]
    view: View
    shots: Sequence[int]
    draws: int
    costs: Sequence[float]
    batch: int

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.wholes("eval.voc07_low_shot.shots", self.shots)
        checks.whole("eval.voc07_low_shot.draws", self.draws)

    def check_shown(self, shown: Shown) -> None:
        """Raises `UsageError` where a class has too few images for every k."""
        self._allowed(shown)

    def _allowed(self, shown: Shown) -> list[int]:
        positive, negative = (int((shown.train == mark).sum(dim=0).min()) for mark in (THERE, NOT_THERE))
        allowed = [k for k in self.shots if k <= min(positive, negative // _NEGATIVES)]
        if not allowed:
            raise UsageError(
                f"eval.voc07_low_shot.shots={list(self.shots)}: a class has only {positive} positive images and one "
                f"{negative} negative ones, of which k needs {_NEGATIVES} times as many: name smaller k"
            )
        return allowed

    def measure(self, known: Grams, context: Context, layer: str, deviations: tuple[str, ...]) -> Iterator[Score]:
        """Scores of each k. The draws depend on the seed, k and the labels alone."""
        shown = known.shown
        shots = self._allowed(shown)
        factor = leading_factor(known.train)
        if missing := sorted(set(self.shots) - set(shots)):
            deviations += (f"no k={','.join(map(str, missing))}, for which a class has too few images",)
        for k in shots:
            drawn = draw(shown.present, shown.classes, k, self.draws, context.seed)
            on_test, on_rest = self._maps(known, drawn, factor)
            best = int(on_test.mean(dim=0).argmax())
            values = on_test[:, best]
            published = Score(
                table="Low-shot SVM, VOC07 protocol, mAP",
                column=f"k={k}",
                layer=layer,
                metric=f"map_k{k}",
                series="map",
                k=k,
                headline=k == closest_to_20(shots),
                value=float(values.mean()),
                n=len(known.test),
                protocol="3.2",
                deviations=deviations,
                choice=self._choice(best, "test as published"),
                details=(
                    f"{self.draws} draws, mean over them",
                    f"draws {hashlib.sha256(drawn.cpu().numpy().tobytes()).hexdigest()[:16]}",
                    *_not_judged(shown.train, k),
                ),
            )
            yield published
            for name, value in {"std": values.std(correction=0), "min": values.min(), "max": values.max()}.items():
                yield dataclasses.replace(
                    published,
                    table="",
                    variant=f"{name} over draws",
                    headline=False,
                    metric=f"map_k{k}_{name}",
                    spread=name,
                    value=float(value),
                )
            if not on_rest.isnan().any():  # else every class is: each draw of a class leaves as many of its images
                chosen = int(on_rest.mean(dim=0).argmax())
                yield dataclasses.replace(
                    published,
                    metric=f"map_k{k}_cv",
                    series="map_cv",
                    variant=CHOSEN_WITHOUT_TEST,
                    headline=False,
                    value=float(on_test[:, chosen].mean()),
                    choice=self._choice(chosen, "the training images not drawn"),
                )

    def _choice(self, number: int, images: str) -> str:
        return f"cost {self.costs[number]:g} of {len(self.costs)} chosen on {images}"

    def _maps(
        self, known: Grams, drawn: Drawn, factor: Float[Tensor, "n r"]
    ) -> tuple[Float[Tensor, "draws costs"], Float[Tensor, "draws costs"]]:
        """Mean average precision in percent on test, and on the training images that were not drawn."""
        coefficients = self._fit(known.train, drawn.flatten(0, 1), factor)  # (classes x draws, n, costs)
        shape = (len(drawn), self.draws, -1, len(self.costs))
        by_class = coefficients.view(*shape).permute(2, 0, 1, 3).flatten(1)  # (n, classes x draws x costs)
        test, rest = ((gram @ by_class).view(len(gram), len(drawn), -1) for gram in (known.test, known.train))
        on_rest = 100 * _rest_precision(rest, known.shown.train.to(rest.device), drawn, len(self.costs))
        return known.test_map(test).view(self.draws, -1), on_rest.view(self.draws, -1)

    def _fit(
        self, gram: Float[Tensor, "n n"], drawn: Int[Tensor, "p s"], factor: Float[Tensor, "n r"]
    ) -> Float[Tensor, "p n costs"]:
        """Coefficients of each draw's SVMs among all n training images, costs as listed."""
        size, n_costs = drawn.shape[1], len(self.costs)
        # Alike for every draw, whose positive images come first: signs and weights (s costs)
        positive = torch.arange(size, device=gram.device) < size // (1 + _NEGATIVES)
        signs = torch.where(positive, 1.0, -1.0).double().unsqueeze(1).expand(-1, n_costs)
        costs = torch.tensor(list(self.costs), dtype=torch.float64, device=gram.device)
        weights = class_weights(positive).unsqueeze(1) * costs
        found = gram.new_zeros(len(drawn), len(gram), n_costs)
        for some_draws in torch.arange(len(drawn)).split(max(1, _MOST_GRAM_BYTES // (8 * size * size))):
            rows = drawn[some_draws].to(gram.device)
            shape = (len(rows), size, n_costs)
            some = fit(
                gram[rows.unsqueeze(2), rows.unsqueeze(1)],
                signs.expand(shape),
                weights.expand(shape),
                factor=factor[rows],
            ).coefficients
            found[some_draws] = found[some_draws].scatter(1, rows.unsqueeze(2).expand(shape), some)
        return found


def _not_judged(present: Presence, k: int) -> Iterator[str]:
    """Words on classes all of whose positive images every draw takes, so that no cost is judged by them."""
    n_classes = present.shape[1]
    used_up = int(((present == THERE).sum(dim=0) == k).sum())
    if used_up == n_classes:
        yield "no cost chosen without the test set, as draws leave no positive image"
    elif used_up:
        yield f"{used_up} of {n_classes} classes have no positive image left to choose a cost by"


def draw(present: Presence, classes: Sequence[int], k: int, draws: int, seed: int) -> Drawn:
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


def _rest_precision(
    scores: Float[Tensor, "n classes m"], present: Presence, drawn: Drawn, n_costs: int
) -> Float[Tensor, "m"]:
    """Mean over classes of average precision on the training images of a class that its draw left; 0 to 1."""
    drawn = drawn.to(scores.device)
    taken = torch.zeros(*present.shape, drawn.shape[1], dtype=torch.bool, device=scores.device)
    taken.scatter_(0, drawn.permute(2, 0, 1), torch.ones_like(drawn.permute(2, 0, 1), dtype=torch.bool))
    counted = ~taken.repeat_interleave(n_costs, dim=2) & (present != DIFFICULT).unsqueeze(2)
    positive = (present == THERE).unsqueeze(2).expand_as(scores)
    flat = [part.reshape(len(scores), -1) for part in (scores, positive, counted)]
    return ap_area(*flat).view(present.shape[1], -1).nanmean(dim=0)
