"""The pretext task relative location: its network, right answers, loss and count of right answers.

An image gives eight questions. Each shows the network the center patch and one of its eight
neighbors, and asks which of the eight positions the neighbor has. Each patch is encoded once.

docs/extending.md lists what else depends on the task, and so would change with another one.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from relloc import checks
from relloc.geometry import CELLS, CENTER, NEIGHBORS
from relloc.models.backbone import Backbone
from relloc.models.ghost_batch_norm import Groups, use_ghost_batches
from relloc.models.one_value import refuse_one_value
from relloc.models.pair_head import CenterEmbeddings, DropoutMask, Logits, NeighborEmbeddings

Patches = Float[Tensor, "b 9 3 p p"]  # in the grid's row-by-row order
Embeddings = tuple[NeighborEmbeddings, CenterEmbeddings]
# Questions about an image: one for each pair of a neighbor and the center
N_PAIRS = len(NEIGHBORS)
# Where the neighbor of each label lies, seen from the center
POSITIONS = ("up_left", "up", "up_right", "left", "right", "down_left", "down", "down_right")
CHANCE_LOSS = math.log(N_PAIRS)  # of a network that finds all eight positions equally likely


class RelativeLocation(nn.Module):
    """A backbone and a head that give the logits of the eight (neighbor, center) pairs of an image.

    The published recipe encodes the center of an image eight times, once with each neighbor. Here
    it is encoded once, with the same result: to repeat a sample changes neither the mean nor the
    biased variance of a batch (protocols.md 2.2). Only the running variance differs, by the factor
    (M - 1/8) / (M - 1) with M values a channel: 0.4 % or less from 64 images with maps of 2x2 on.

    Args:
        backbone: encodes patches.
        head: takes embeddings of neighbors and centers, and gives logits.
        batch_norm: "separate" normalizes neighbors and centers as two groups in the backbone, as
            the published recipe does; "joint" all nine patches as one.
        images_per_batch_norm: how many consecutive images share batch-norm statistics in training
            (a ghost batch).
        one_pass: whether all ghost batches go through the network at once and not one after the
            other, for torch.compile. Results differ by rounding alone.
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
            # With several ghost batches in one forward, each batch norm has to know which rows
            # share statistics. The head sees a row for each of the eight pairs.
            rows_in_backbone = (N_PAIRS, 1) if batch_norm == "separate" else (CELLS,)
            groups_in_backbone = Groups(
                images=images_per_batch_norm, rows_per_image=rows_in_backbone
            )
            use_ghost_batches(backbone, groups_in_backbone)
            groups_in_head = Groups(images=images_per_batch_norm, rows_per_image=(N_PAIRS,))
            use_ghost_batches(head, groups_in_head)

    def forward(
        self,
        patches: Patches,
        dropout_mask: DropoutMask | None = None,
    ) -> Logits:
        """Returns the logits (image, pair, label) of patches in the grid's row-by-row order.

        `dropout_mask` says which hidden units of the head are kept in training;
        `head.draw_dropout_mask` makes it.
        """
        # All images at once: with `one_pass` batch norms separate the ghost batches themselves, and
        # in eval mode statistics are fixed.
        if self.one_pass or not self.training:
            neighbors, centers = self._embed(patches)
            return self.head(neighbors, centers, dropout_mask)
        ghost_batches = patches.split(self.images_per_batch_norm)
        masks: list[Tensor | None] = [None] * len(ghost_batches)
        if dropout_mask is not None:
            masks = list(dropout_mask.split(self.images_per_batch_norm))
        logits = []
        for ghost_batch, mask in zip(ghost_batches, masks, strict=True):
            neighbors, centers = self._embed(ghost_batch)
            logits.append(self.head(neighbors, centers, mask))
        # A single one stays as it is, which spares a copy.
        if len(logits) == 1:
            return logits[0]
        return torch.cat(logits)

    def _embed(self, patches: Patches) -> Embeddings:
        b = len(patches)
        if self.batch_norm == "joint":
            rows = self._encode(patches.flatten(0, 1))
            embedded = rows.unflatten(0, (b, -1))
            return _without_center(embedded, dim=1), embedded[:, CENTER]
        if self.one_pass and self.training:
            return self._embed_ghost_batches(patches)
        # Two forwards of the backbone, so that its batch norms see neighbors and centers apart.
        neighbor_patches = _without_center(patches, dim=1)
        neighbors = self._encode(neighbor_patches.flatten(0, 1))
        centers = self._encode(patches[:, CENTER])
        return neighbors.unflatten(0, (b, -1)), centers

    def _embed_ghost_batches(self, patches: Patches) -> Embeddings:
        """Embeds the patches of all ghost batches in one forward of the backbone."""
        b = len(patches)
        n = self.images_per_batch_norm
        ghost_batches = patches.unflatten(0, (-1, n))
        # In each ghost batch all neighbors come first and then all centers, as `Groups` expects.
        neighbor_patches = _without_center(ghost_batches, dim=2).flatten(1, 2)
        center_patches = ghost_batches[:, :, CENTER]
        rows = torch.cat([neighbor_patches, center_patches], 1)
        encoded = self._encode(rows.flatten(0, 1))
        # Back to one entry for each image.
        embedded = encoded.unflatten(0, (-1, CELLS * n))
        neighbors, centers = embedded.split([N_PAIRS * n, n], dim=1)
        return neighbors.reshape(b, N_PAIRS, -1), centers.reshape(b, -1)

    def _encode(self, rows: Float[Tensor, "n 3 p p"]) -> Float[Tensor, "n d"]:
        # In the memory format of the weights; otherwise the first convolution would copy its input
        # in the forward and again in the backward.
        memory_format = _memory_format(self.backbone)
        return self.backbone.embed(rows.contiguous(memory_format=memory_format))


@torch.no_grad()
def check_batch_norms(model: RelativeLocation, patch_px: int) -> None:
    """Checks that no batch norm of the model would train on a single value a channel.

    That happens with a group of one patch, so with one image a batch norm, whose feature map has
    one pixel. The check does a forward, which changes the running statistics of the model.

    Raises:
        UsageError: a batch norm would get a single value a channel.
    """
    n = model.images_per_batch_norm
    if n > 1:
        return
    message = (
        f"recipe.images_per_batch_norm={n}: a batch norm would see one value a channel, of which "
        "there is no variance. Give recipe.images_per_batch_norm=2 or more, or "
        "pretext_batch_norm=joint, where nine patches count together"
    )
    with refuse_one_value(model.train(), message):
        model(torch.zeros(n, CELLS, 3, patch_px, patch_px))


def _memory_format(module: nn.Module) -> torch.memory_format:
    """Returns the memory format of a module's convolutions."""
    for weight in module.parameters():
        is_convolution = weight.dim() == 4
        if is_convolution and not weight.is_contiguous():
            return torch.channels_last
    return torch.contiguous_format


def _without_center(cells: Tensor, dim: int) -> Tensor:
    # By slices, since a list of indices would be copied to the GPU, and the host would wait for it.
    n_after = CELLS - CENTER - 1
    before, _, after = cells.split([CENTER, 1, n_after], dim)
    return torch.cat([before, after], dim)


def labels(logits: Logits) -> Int[Tensor, "b 8"]:
    """Returns the right answers: pair i of every image has label i."""
    n_pairs = logits.shape[1]
    of_an_image = torch.arange(n_pairs, device=logits.device)
    return of_an_image.expand(logits.shape[:2])


def loss(logits: Logits) -> Float[Tensor, ""]:
    """Returns the cross entropy, its mean over all pairs.

    A network that finds all positions equally likely has a loss of log 8 = 2.079.
    """
    # bfloat16 is too coarse for a loss. float64 stays, for tests that compare to more digits.
    exact = logits if logits.dtype == torch.float64 else logits.float()
    right_labels = labels(logits).flatten()
    return cross_entropy(exact.flatten(0, 1), right_labels)


def hits(logits: Logits) -> Int[Tensor, "b"]:
    """Returns the number of right answers (0 to 8) for each image."""
    answers = logits.argmax(dim=2)
    return (answers == labels(logits)).sum(dim=1)
