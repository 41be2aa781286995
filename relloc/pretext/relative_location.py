"""The network of the pretext task relative location.

Each patch of an image is encoded once, and the head answers questions about several of them:
`relloc.pretext.questions` says which, and what is right.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from relloc import checks
from relloc.errors import UsageError
from relloc.geometry import CENTER
from relloc.models.backbone import Backbone
from relloc.models.ghost_batch_norm import Groups, use_ghost_batches
from relloc.models.one_value import refuse_one_value
from relloc.models.pair_head import DropoutMask, Logits, Parts
from relloc.pretext.questions import CENTER_PAIRS, Questions, without_center

Patches = Float[Tensor, "b cells 3 p p"]  # in the grid's row-by-row order
Group = Float[Tensor, "b _ 3 p p"]  # patches of each image that are normalized together
BATCH_NORMS = ("separate", "joint", "cell")


class RelativeLocation(nn.Module):
    """A backbone and a head that give the logits of all questions about an image.

    The published recipe encodes the center of an image eight times, once with each neighbor. Here
    it is encoded once, with the same result: to repeat a sample changes neither the mean nor the
    biased variance of a batch (protocols.md 2.2). Only the running variance differs, by the factor
    (M - 1/8) / (M - 1) with M values a channel: 0.4 % or less from 64 images with maps of 2x2 on.

    Args:
        backbone: encodes patches.
        head: takes embeddings by the part of their patches in questions, and gives logits.
        questions: what is asked about an image.
        batch_norm: which patches are normalized together in the backbone. "separate" normalizes
            neighbors and centers as two groups, as the published recipe does; "joint" all patches
            as one; "cell" those of each cell of the grid apart.
        images_per_batch_norm: how many consecutive images share batch-norm statistics in training
            (a ghost batch).
        one_pass: whether all ghost batches go through the network at once and not one after the
            other, as fast steps on a GPU do. Results differ by rounding alone.

    Raises:
        UsageError: there is no such `batch_norm`, or not for these questions.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: nn.Module,
        *,
        questions: Questions = CENTER_PAIRS,
        batch_norm: Literal["separate", "joint", "cell"],
        images_per_batch_norm: int,
        one_pass: bool = False,
    ) -> None:
        super().__init__()
        checks.one_of("pretext_batch_norm", batch_norm, BATCH_NORMS)
        if batch_norm == "separate" and not questions.have_center:
            raise UsageError(
                "pretext_batch_norm=separate normalizes centers apart from neighbors, and is for "
                "pairs=center alone: give pretext_batch_norm=joint, or cell"
            )
        self.backbone = backbone
        self.head = head
        self.questions = questions
        self.batch_norm = batch_norm
        self.images_per_batch_norm = images_per_batch_norm
        self.one_pass = one_pass
        if one_pass:
            # With several ghost batches in one forward, each batch norm has to know which rows
            # share statistics. The head sees a row for each question.
            n_cells = questions.n_cells
            rows_in_backbone = {
                "separate": (n_cells - 1, 1),
                "joint": (n_cells,),
                "cell": (1,) * n_cells,
            }
            groups_in_backbone = Groups(
                images=images_per_batch_norm, rows_per_image=rows_in_backbone[batch_norm]
            )
            use_ghost_batches(backbone, groups_in_backbone)
            rows_in_head = (questions.n_questions,)
            groups_in_head = Groups(images=images_per_batch_norm, rows_per_image=rows_in_head)
            use_ghost_batches(head, groups_in_head)

    def forward(
        self,
        patches: Patches,
        dropout_mask: DropoutMask | None = None,
    ) -> Logits:
        """Returns the outputs (image, question, output) for patches in the grid's order.

        `dropout_mask` says which hidden units of the head are kept in training;
        `head.draw_dropout_mask` makes it.
        """
        # All images at once: with `one_pass` batch norms separate the ghost batches themselves, and
        # in eval mode statistics are fixed.
        if self.one_pass or not self.training:
            return self.answer(self.questions, patches, dropout_mask)
        ghost_batches = patches.split(self.images_per_batch_norm)
        masks: list[Tensor | None] = [None] * len(ghost_batches)
        if dropout_mask is not None:
            masks = list(dropout_mask.split(self.images_per_batch_norm))
        outputs = []
        for ghost_batch, mask in zip(ghost_batches, masks, strict=True):
            outputs.append(self.answer(self.questions, ghost_batch, mask))
        # A single one stays as it is, which spares a copy.
        if len(outputs) == 1:
            return outputs[0]
        return torch.cat(outputs)

    def answer(
        self,
        questions: Questions,
        patches: Patches,
        dropout_mask: DropoutMask | None = None,
    ) -> Logits:
        """Returns the outputs for other questions than those of the training, in eval mode.

        In training mode this is a forward of one ghost batch, or of all with `one_pass`.
        """
        parts = self._embed(questions, patches)
        return self.head(parts, questions.combine, dropout_mask)

    def _embed(self, questions: Questions, patches: Patches) -> Parts:
        """Returns the embeddings of the patches by their part in the questions."""
        groups = self._groups(patches)
        if self.one_pass and self.training and len(groups) > 1:
            embedded = self._embed_ghost_batches(groups)
        else:
            # A forward of the backbone for each group, so that its batch norms see them apart.
            embedded = []
            for group in groups:
                rows = self._encode(group.flatten(0, 1))
                embedded.append(rows.unflatten(0, group.shape[:2]))
        if self.batch_norm == "separate":
            # The groups are the parts already.
            neighbors, centers = embedded
            return neighbors, centers.squeeze(1)
        cells = embedded[0] if len(embedded) == 1 else torch.cat(embedded, 1)
        return questions.select(cells)

    def _groups(self, patches: Patches) -> list[Group]:
        """Returns the patches by groups that are normalized together."""
        if self.batch_norm == "joint":
            return [patches]
        if self.batch_norm == "separate":
            return [without_center(patches, dim=1), patches[:, CENTER].unsqueeze(1)]
        return list(patches.split(1, dim=1))

    def _embed_ghost_batches(self, groups: list[Group]) -> list[Tensor]:
        """Embeds the patches of all ghost batches in one forward of the backbone."""
        b = len(groups[0])
        n = self.images_per_batch_norm
        # In each ghost batch all patches of a group come before those of the next, as `Groups`
        # expects.
        rows = [group.unflatten(0, (-1, n)).flatten(1, 2) for group in groups]
        encoded = self._encode(torch.cat(rows, 1).flatten(0, 1))
        # Back to one entry for each image.
        sizes = [rows_of_group.shape[1] for rows_of_group in rows]
        embedded = encoded.unflatten(0, (-1, sum(sizes))).split(sizes, dim=1)
        return [
            of_group.reshape(b, group.shape[1], -1)
            for of_group, group in zip(embedded, groups, strict=True)
        ]

    def _encode(self, rows: Float[Tensor, "n 3 p p"]) -> Float[Tensor, "n d"]:
        # In the memory format of the weights; otherwise the first convolution would copy its input
        # in the forward and again in the backward.
        memory_format = _memory_format(self.backbone)
        return self.backbone.embed(rows.contiguous(memory_format=memory_format))


class CenterNetwork(nn.Module):
    """A network that was trained on any pairs, asked about the eight pairs with the center.

    It answers with one of the eight positions around the center, whatever other answers it has, so
    that networks are compared on the same questions. It is for eval mode.

    Args:
        network: the trained network, whose modules it shares.
        columns: which of its outputs stand for the eight positions.
    """

    columns: Tensor

    def __init__(self, network: RelativeLocation, columns: Sequence[int]) -> None:
        super().__init__()
        self.network = network
        device = next(network.parameters()).device
        # Not persistent: it is no part of what was trained.
        self.register_buffer("columns", torch.tensor(columns, device=device), persistent=False)

    def forward(self, patches: Float[Tensor, "b 9 3 p p"]) -> Float[Tensor, "b 8 8"]:
        """Returns logits of each pair of a neighbor and the center, and each position."""
        outputs = self.network.answer(CENTER_PAIRS, patches)
        return outputs[:, :, self.columns]


def about_center(network: RelativeLocation) -> nn.Module | None:
    """Returns `network` as it answers `CenterPairs`, or None where its answers are no positions."""
    if network.questions == CENTER_PAIRS:
        return network
    columns = network.questions.columns_of_positions()
    return None if columns is None else CenterNetwork(network, columns)


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
        "pretext_batch_norm=joint, where all patches of an image count together"
    )
    with refuse_one_value(model.train(), message):
        model(torch.zeros(n, model.questions.n_cells, 3, patch_px, patch_px))


def _memory_format(module: nn.Module) -> torch.memory_format:
    """Returns the memory format of a module's convolutions."""
    for weight in module.parameters():
        is_convolution = weight.dim() == 4
        if is_convolution and not weight.is_contiguous():
            return torch.channels_last
    return torch.contiguous_format
