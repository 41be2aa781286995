"""Relative location: eight questions an image, each patch encoded once."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from relloc.errors import UsageError
from relloc.geometry import CENTER, NEIGHBORS
from relloc.models.backbone import Backbone


class RelativeLocation(nn.Module):
    """Backbone and head; the logits of the eight (neighbor, center) pairs of each image.

    Batch norm in the backbone sees neighbors and centers as two groups ("separate") or all nine
    patches as one ("joint"). Separate equals the published recipe, which encodes every center
    eight times: repeating a sample changes neither the mean nor the biased variance of a batch
    (protocols.md 2.2). Only the running variance differs, by the factor (M - 1/8) / (M - 1) with
    M values a channel: 0.4 % or less from 64 images with maps of 2x2 on.
    """

    def __init__(self, backbone: Backbone, head: nn.Module, *, batch_norm: Literal["separate", "joint"]) -> None:
        super().__init__()
        if batch_norm not in ("separate", "joint"):
            raise UsageError(f"pretext_batch_norm={batch_norm} is not separate or joint")
        self.backbone = backbone
        self.head = head
        self.batch_norm = batch_norm

    def forward(self, patches: Float[Tensor, "b 9 3 p p"]) -> Float[Tensor, "b 8 8"]:
        """Logits (image, pair, label) of patches in the grid's row-major order."""
        neighbors, centers = self._embed(patches)
        return self.head(neighbors, centers)

    def _embed(self, patches: Tensor) -> tuple[Float[Tensor, "b 8 d"], Float[Tensor, "b d"]]:
        b = len(patches)
        if self.batch_norm == "joint":
            cells = self.backbone.embed(patches.flatten(0, 1)).unflatten(0, (b, -1))
            return cells[:, NEIGHBORS], cells[:, CENTER]
        around = patches[:, NEIGHBORS].flatten(0, 1)
        return self.backbone.embed(around).unflatten(0, (b, -1)), self.backbone.embed(patches[:, CENTER])


def labels(logits: Float[Tensor, "b 8 8"]) -> Tensor:
    """The right answers (b 8): pair i of an image has label i."""
    return torch.arange(logits.shape[1], device=logits.device).expand(logits.shape[:2])


def loss(logits: Float[Tensor, "b 8 8"]) -> Float[Tensor, ""]:
    """Cross entropy, the mean over all pairs; log 8 = 2.079 is a network that knows nothing."""
    return cross_entropy(logits.float().flatten(0, 1), labels(logits).flatten())


def hits(logits: Float[Tensor, "b 8 8"]) -> Tensor:
    """Right answers of each image (b), 0..8."""
    return (logits.argmax(dim=2) == labels(logits)).sum(dim=1)
