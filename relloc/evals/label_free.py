"""How many directions the features of held-out images use, layer by layer, without a label."""

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from relloc import checks
from relloc.data.subsets import evenly_spaced
from relloc.data.views import View
from relloc.errors import UsageError
from relloc.evaluation.contract import Context, Evaluation
from relloc.features.source import FeatureSource
from relloc.features.spectrum import alpha_req, rankme
from relloc.results import Score


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelFree(Evaluation):
    """RankMe and alpha-ReQ of `n_images` held-out images (all, where there are fewer), evenly spaced.

    Both are defined in `relloc.features.spectrum`. RankMe's authors take 25,600 images; it grows with
    their number until that is several times the dimensions, so only rows of one n compare. 4,096 is
    twice a ResNet-50's 2,048 dimensions at avgpool, no more than most evaluation splits have, and the
    decomposition, in float64, takes a fortieth of the time that 25,600 images of 9,216 dimensions take.
    """

    kind = "frozen"
    labels = "none"
    version = 1

    layers: Sequence[str]
    n_images: int
    view: View
    batch: int

    def __post_init__(self) -> None:
        self.check_inputs("eval.label_free")
        checks.whole("eval.label_free.n_images", self.n_images, at_least=2)  # a spectrum needs two

    def run(self, context: Context) -> Iterator[Score]:
        """`rankme` and `alpha_req` of each layer. Nothing is random.

        alpha-ReQ is left out, as the protocol of RankMe then says, where features span fewer than the
        5 directions that it needs.

        Raises:
            UsageError: features that are not finite, or all zero.
        """
        indices = torch.tensor(evenly_spaced(context.held_out.n, self.n_images), dtype=torch.int64)
        for layer, rows in self._features(context.held_out, indices).items():
            details = [f"singular values of {len(rows)} images, evenly spaced over the split"]
            if layer != "avgpool":
                details.append(f"features of {layer} pooled as in 3.1")
            try:
                rank = rankme(rows)
            except ValueError as error:
                raise UsageError(
                    f"eval.label_free at {layer}: {error}. The network may have diverged or be dead there, or half "
                    "precision overflowed: give precision=fp32, batch_norm=recalibrated, other weights, or leave the "
                    "layer out"
                ) from error
            alpha, why_not = None, []
            try:
                alpha = alpha_req(rows)
            except ValueError as error:
                why_not = [f"no alpha-ReQ: {error}"]
            score = Score(
                table="Label-free measures",
                column=layer,
                variant="RankMe",
                layer=layer,
                metric="rankme",
                unit="directions",
                higher_is_better=None,
                headline=True,
                value=rank,
                n=len(rows),
                details=(*details, *why_not),
            )
            yield score
            if alpha is not None:
                yield dataclasses.replace(
                    score,
                    variant="alpha-ReQ",
                    metric="alpha_req",
                    unit="exponent",
                    headline=False,
                    value=alpha,
                    details=tuple(details),
                )

    def _features(self, source: FeatureSource, indices: Int[Tensor, "m"]) -> dict[str, Float[Tensor, "m _d"]]:
        parts: dict[str, list[Tensor]] = {layer: [] for layer in self.layers}
        for features, _ in source.batches(indices, self.batch, self.layers):
            for layer, rows in parts.items():
                rows.append(features[layer].cpu())
        return {layer: torch.cat(rows) for layer, rows in parts.items()}
