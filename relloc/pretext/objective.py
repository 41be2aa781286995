"""Relative location: eight questions an image, each patch encoded once."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from relloc import checks
from relloc.geometry import CELLS, CENTER, NEIGHBORS
from relloc.models.backbone import Backbone
from relloc.models.ghost_batch_norm import Groups, use_ghost_batches
from relloc.models.one_value import refuse_one_value
from relloc.models.pair_head import CenterEmbeddings, Logits, NeighborEmbeddings


class RelativeLocation(nn.Module):
    """Backbone and head; the logits of the eight (neighbor, center) pairs of each image.

    In training `images_per_batch_norm` images share batch-norm statistics, in order. In the backbone
    their neighbors and centers are two groups ("separate") or all nine patches one ("joint").
    Separate equals the published recipe, which encodes every center eight times: repeating a sample
    changes neither the mean nor the biased variance of a batch (protocols.md 2.2). Only the running
    variance differs, by the factor (M - 1/8) / (M - 1) with M values a channel: 0.4 % or less from
    64 images with maps of 2x2 on.

    Groups pass through the network one after the other, or with `one_pass` all together, which is
    the same but for rounding and is for torch.compile.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: nn.Module,
        *,
        batch_norm: Literal["separate", "joint"],
        images_per_batch_norm: int,
        one_pass: bool = False,
    ) -> None:
        super().__init__()
        checks.one_of("pretext_batch_norm", batch_norm, ("separate", "joint"))
        self.backbone = backbone
        self.head = head
        self.batch_norm = batch_norm
        self.images_per_batch_norm = images_per_batch_norm
        self.one_pass = one_pass
        if one_pass:
            rows = (len(NEIGHBORS), 1) if batch_norm == "separate" else (CELLS,)
            use_ghost_batches(backbone, Groups(images=images_per_batch_norm, rows_per_image=rows))
            use_ghost_batches(head, Groups(images=images_per_batch_norm, rows_per_image=(len(NEIGHBORS),)))

    def forward(self, patches: Float[Tensor, "b 9 3 p p"], kept: Bool[Tensor, "b 8 h"] | None = None) -> Logits:
        """Logits (image, pair, label) of patches in the grid's row-major order.

        `kept` is what dropout keeps of the head's hidden units in training: `head.draw_dropout_mask` draws it.
        """
        together = len(patches) if self.one_pass or not self.training else self.images_per_batch_norm
        parts = patches.split(together)
        masks = [None] * len(parts) if kept is None else kept.split(together)
        logits = [self.head(*self._embed(part), mask) for part, mask in zip(parts, masks, strict=True)]
        return torch.cat(logits) if len(logits) > 1 else logits[0]

    def _embed(self, patches: Tensor) -> tuple[NeighborEmbeddings, CenterEmbeddings]:
        if self.batch_norm == "joint":
            cells = self._encode(patches.flatten(0, 1)).unflatten(0, (len(patches), -1))
            return _around(cells, 1), cells[:, CENTER]
        if not (self.one_pass and self.training):
            around = self._encode(_around(patches, 1).flatten(0, 1))
            return around.unflatten(0, (len(patches), -1)), self._encode(patches[:, CENTER])
        # In each ghost batch first the neighbors, then the centers, as `Groups` wants them.
        b, n = len(patches), self.images_per_batch_norm
        ghosts = patches.unflatten(0, (-1, n))
        rows = torch.cat([_around(ghosts, 2).flatten(1, 2), ghosts[:, :, CENTER]], 1)
        embedded = self._encode(rows.flatten(0, 1)).unflatten(0, (-1, CELLS * n))
        around, centers = embedded.split([len(NEIGHBORS) * n, n], dim=1)
        return around.reshape(b, len(NEIGHBORS), -1), centers.reshape(b, -1)

    def _encode(self, rows: Float[Tensor, "n 3 p p"]) -> Float[Tensor, "n d"]:
        # In the format of the weights, else the first convolution copies its input, forth and back.
        return self.backbone.embed(rows.contiguous(memory_format=_memory_format(self.backbone)))


@torch.no_grad()
def check_batch_norms(model: RelativeLocation, patch_px: int) -> None:
    """Raises `UsageError` where a batch norm would be trained on one value a channel; changes statistics.

    That needs a group of one patch, so a single image a batch norm, and a map of one pixel.
    """
    n = model.images_per_batch_norm
    if n > 1:
        return
    told = (
        f"recipe.images_per_batch_norm={n}: a batch norm would see one value a channel, of which there is no variance. "
        "Give recipe.images_per_batch_norm=2 or more, or pretext_batch_norm=joint, where nine patches count together"
    )
    with refuse_one_value(model.train(), told):
        model(torch.zeros(n, CELLS, 3, patch_px, patch_px))


def _memory_format(module: nn.Module) -> torch.memory_format:
    """That of a module's convolutions."""
    weights = (weight for weight in module.parameters() if weight.dim() == 4)
    return next((torch.channels_last for weight in weights if not weight.is_contiguous()), torch.contiguous_format)


def _around(cells: Tensor, dim: int) -> Tensor:
    # Slices, since an index list would have to travel to the GPU, which waits for it.
    before, _, after = cells.split([CENTER, 1, CELLS - CENTER - 1], dim)
    return torch.cat([before, after], dim)


def labels(logits: Logits) -> Tensor:
    """The right answers (b 8): pair i of an image has label i."""
    return torch.arange(logits.shape[1], device=logits.device).expand(logits.shape[:2])


def loss(logits: Logits) -> Float[Tensor, ""]:
    """Cross entropy, the mean over all pairs; log 8 = 2.079 is a network that knows nothing."""
    # bfloat16 is too coarse for it; float64 stays, so that tests of equality see no float32 rounding.
    exact = logits if logits.dtype == torch.float64 else logits.float()
    return cross_entropy(exact.flatten(0, 1), labels(logits).flatten())


def hits(logits: Logits) -> Tensor:
    """Right answers of each image (b), 0..8."""
    return (logits.argmax(dim=2) == labels(logits)).sum(dim=1)
