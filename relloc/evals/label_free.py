"""Measures how many directions the features of each layer use, without labels.

The measures are RankMe and alpha-ReQ.
"""

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
    """RankMe and alpha-ReQ of the features of `n_images` held-out images, evenly spaced.

    Where there are fewer images, all are taken. `relloc.features.spectrum` defines both measures.

    The authors of RankMe take 25,600 images. RankMe grows with their number until that is several
    times the dimensions, so only numbers for the same n can be compared. The default of 4,096
    images is twice the 2,048 dimensions of a ResNet-50's avgpool, is no more than most evaluation
    splits have, and takes a fortieth of the time for the decomposition in float64 that 25,600
    images of 9,216 dimensions take.

    `layers`: the layers to measure. `view`: how images are cropped and resized.
    `batch`: the number of images that are read at once.

    Raises:
        UsageError: one of these is wrong.
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
        # The features of a single image, minus their mean, have no spectrum.
        checks.whole("eval.label_free.n_images", self.n_images, at_least=2)

    def run(self, context: Context) -> Iterator[Score]:
        """Yields `rankme` and `alpha_req` of each layer. Nothing is random.

        alpha-ReQ is left out where features span fewer than the 5 directions that it needs; the
        details of RankMe then say so.

        Raises:
            UsageError: features are not finite, or all zero.
        """
        positions = evenly_spaced(context.held_out.n, self.n_images)
        indices = torch.tensor(positions, dtype=torch.int64)
        # All layers are read in one pass, as reading and encoding images takes most of the time.
        features = self._read(context.held_out, indices)
        for layer, rows in features.items():
            details = [f"singular values of {len(rows)} images, evenly spaced over the split"]
            if layer != "avgpool":
                details.append(f"features of {layer} pooled as in 3.1")
            try:
                rank = rankme(rows)
            except ValueError as error:
                raise UsageError(
                    f"eval.label_free at {layer}: {error}. The network may have diverged or be "
                    "dead there, or half precision overflowed: give precision=fp32, "
                    "batch_norm=recalibrated, other weights, or leave the layer out"
                ) from error
            # Features may use too few directions for a power law, which is a finding and no error.
            alpha = None
            missing = []
            try:
                alpha = alpha_req(rows)
            except ValueError as error:
                missing = [f"no alpha-ReQ: {error}"]

            score = Score(
                table="Label-free measures",
                column=layer,
                variant="RankMe",
                layer=layer,
                metric="rankme",
                unit="directions",
                # A higher rank is not better in itself: it has to be seen beside accuracies.
                higher_is_better=None,
                headline=True,
                value=rank,
                n=len(rows),
                details=(*details, *missing),
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

    def _read(
        self,
        source: FeatureSource,
        indices: Int[Tensor, "m"],
    ) -> dict[str, Float[Tensor, "m _d"]]:
        """Returns the features of the images at `indices` by layer, on the CPU."""
        batches: dict[str, list[Tensor]] = {layer: [] for layer in self.layers}
        for features, _ in source.batches(indices, self.batch, self.layers):
            for layer, rows in batches.items():
                rows.append(features[layer].cpu())
        joined = {}
        for layer, rows in batches.items():
            joined[layer] = torch.cat(rows)
        return joined
