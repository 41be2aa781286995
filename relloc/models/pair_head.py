"""Heads that classify where a neighbor patch lies relative to the center patch.

Each (neighbor, center) pair of embeddings becomes eight logits, one for each relative location.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import linear

from relloc.geometry import NEIGHBORS

NeighborEmbeddings = Float[Tensor, "b 8 d"]  # image, neighbor, embedding
CenterEmbeddings = Float[Tensor, "b d"]  # image, embedding
Logits = Float[Tensor, "b 8 8"]  # image, pair, label
DropoutMask = Bool[Tensor, "b 8 h"]  # image, pair, hidden unit: True where the unit is kept


class PairHead(nn.Module):
    """mmselfsup's neck and head: linear, batch norm, ReLU, dropout, linear (docs/protocols.md 2.1).

    The input of the first layer is the concatenation [neighbor, center]. Weights are drawn from
    normal distributions with standard deviations `neck_std` and `head_std`; biases are zero, but
    for `neck_bias` of the first layer. With `embed_dim`, a further linear layer is applied to each
    patch before, as in google 2019; None leaves it out.

    `dropout` is the probability that a hidden unit is dropped. The mask is drawn by
    `draw_dropout_mask` and passed to `forward`, so that randomness is keyed by the caller.
    """

    def __init__(
        self,
        *,
        embedding_dim: int,
        hidden_dim: int,
        batch_norm_momentum: float,
        dropout: float,
        neck_std: float,
        head_std: float,
        neck_bias: float = 0.0,
        embed_dim: int | None = None,
    ) -> None:
        super().__init__()
        # The first linear layer sees two patches, each after `embed` if there is one.
        patch_dim = embed_dim or embedding_dim
        self.embed = nn.Linear(embedding_dim, embed_dim) if embed_dim else nn.Identity()
        joint = nn.Linear(2 * patch_dim, hidden_dim)
        norm = nn.BatchNorm1d(hidden_dim, momentum=batch_norm_momentum)
        self.neck = nn.Sequential(joint, norm, nn.ReLU())
        self.dropout = dropout
        self.answer = nn.Linear(hidden_dim, len(NEIGHBORS))
        for layer, std in ((joint, neck_std), (self.answer, head_std)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(joint.bias, neck_bias)

    def draw_dropout_mask(
        self,
        n_images: int,
        generator: torch.Generator,
    ) -> DropoutMask | None:
        """Returns which hidden units dropout keeps for each pair, or None without dropout."""
        if not self.dropout:
            return None
        hidden_dim = self.answer.in_features
        mask = torch.empty(
            (n_images, len(NEIGHBORS), hidden_dim),
            dtype=torch.bool,
            device=generator.device,
        )
        return mask.bernoulli_(1 - self.dropout, generator=generator)

    def forward(
        self,
        neighbors: NeighborEmbeddings,
        centers: CenterEmbeddings,
        dropout_mask: DropoutMask | None = None,
    ) -> Logits:
        """Returns logits over the eight labels for each (neighbor, center) pair.

        `dropout_mask` acts in training mode alone.
        """
        joint, norm, relu = self.neck
        hidden = _linear_on_pairs(
            joint.weight,  # pyright: ignore[reportArgumentType]
            joint.bias,  # pyright: ignore[reportArgumentType]
            self.embed(neighbors),
            self.embed(centers),
        )
        # Batch norm takes rows, so the pairs of all images become one dimension, and two again.
        normalized = norm(hidden.flatten(0, 1))
        hidden = relu(normalized).unflatten(0, hidden.shape[:2])
        if self.training and dropout_mask is not None:
            # Units that stay are scaled up, so that the expected sum is the same in evaluation.
            hidden = hidden * dropout_mask / (1 - self.dropout)
        return self.answer(hidden)


class AlexNetPairHead(nn.Module):
    """The paper's head: fc7 with batch norm (no scale and shift) and ReLU, fc8 with ReLU, fc9.

    The settings are those of docs/protocols.md 2.1, column deepcontext.
    """

    def __init__(self, *, embedding_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc7 = nn.Linear(2 * embedding_dim, hidden_dim)
        self.norm = nn.BatchNorm1d(hidden_dim, affine=False)
        self.fc8 = nn.Linear(hidden_dim, hidden_dim)
        self.fc9 = nn.Linear(hidden_dim, len(NEIGHBORS))
        for layer in (self.fc7, self.fc8, self.fc9):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def draw_dropout_mask(
        self,
        n_images: int,
        generator: torch.Generator,
    ) -> None:
        """Returns None, as this head has no dropout; `generator` is left as it is."""

    def forward(
        self,
        neighbors: NeighborEmbeddings,
        centers: CenterEmbeddings,
        dropout_mask: None = None,
    ) -> Logits:
        """Returns logits over the eight labels for each (neighbor, center) pair."""
        hidden = _linear_on_pairs(
            self.fc7.weight,
            self.fc7.bias,
            neighbors,
            centers,
        )
        # Batch norm takes rows: one for each pair of each image.
        fc7 = self.norm(hidden.flatten(0, 1)).relu()
        fc8 = self.fc8(fc7).relu()
        return self.fc9(fc8).unflatten(0, neighbors.shape[:2])


def _linear_on_pairs(
    weight: Tensor,
    bias: Tensor,
    neighbors: NeighborEmbeddings,
    centers: CenterEmbeddings,
) -> Float[Tensor, "b 8 h"]:
    """Applies a linear layer to the concatenation [neighbor, center] of each pair.

    A linear layer of a concatenation is the sum of two linear layers. So the center's half is
    computed once for an image instead of once for each of its eight pairs.
    """
    neighbor_weight, center_weight = weight.chunk(2, dim=1)
    from_neighbors = linear(neighbors, neighbor_weight)
    from_centers = linear(centers, center_weight, bias)
    return from_neighbors + from_centers.unsqueeze(1)
