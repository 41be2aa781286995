"""Heads that answer where a neighbor lies relative to the center: two embeddings in, eight logits out."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import linear

from relloc.geometry import NEIGHBORS

Neighbors = Float[Tensor, "b 8 d"]  # their embeddings
Centers = Float[Tensor, "b d"]
Logits = Float[Tensor, "b 8 8"]  # image, pair, label


class PairHead(nn.Module):
    """mmselfsup's neck and head: Linear, batch norm, ReLU, dropout, Linear (protocols.md 2.1, M0).

    The input is the concatenation [neighbor, center]. Weights are normal with `neck_std` and
    `head_std`; biases are zero, but for `neck_bias`. `embed_dim` puts a linear layer before, applied
    to each patch alone, as in google 2019; None leaves it out.
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
        width = embed_dim or embedding_dim
        self.embed = nn.Linear(embedding_dim, embed_dim) if embed_dim else nn.Identity()
        joint = nn.Linear(2 * width, hidden_dim)
        norm = nn.BatchNorm1d(hidden_dim, momentum=batch_norm_momentum)
        self.neck = nn.Sequential(joint, norm, nn.ReLU())
        self.dropout = dropout
        self.answer = nn.Linear(hidden_dim, len(NEIGHBORS))
        for layer, std in ((joint, neck_std), (self.answer, head_std)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(joint.bias, neck_bias)

    def draw_kept(self, n_images: int, generator: torch.Generator) -> Bool[Tensor, "n 8 h"] | None:
        """Which hidden units dropout keeps, for each pair; None where nothing is dropped."""
        if not self.dropout:
            return None
        shape = (n_images, len(NEIGHBORS), self.answer.in_features)
        kept = torch.empty(shape, dtype=torch.bool, device=generator.device)
        return kept.bernoulli_(1 - self.dropout, generator=generator)

    def forward(
        self,
        neighbors: Neighbors,
        centers: Centers,
        kept: Bool[Tensor, "b 8 h"] | None = None,
    ) -> Logits:
        """Logits over the eight labels for each (neighbor, center) pair; `kept` acts in training alone."""
        joint, norm, rectify = self.neck
        hidden = _linear_of_pairs(joint.weight, joint.bias, self.embed(neighbors), self.embed(centers))  # pyright: ignore[reportArgumentType]
        hidden = rectify(norm(hidden.flatten(0, 1))).unflatten(0, hidden.shape[:2])
        if self.training and kept is not None:
            hidden = hidden * kept / (1 - self.dropout)
        return self.answer(hidden)


class AlexNetPairHead(nn.Module):
    """fc7 (batch norm without scale and shift, ReLU), fc8 (ReLU), fc9 (protocols.md 2.1, DC)."""

    def __init__(self, *, embedding_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc7 = nn.Linear(2 * embedding_dim, hidden_dim)
        self.norm = nn.BatchNorm1d(hidden_dim, affine=False)
        self.fc8 = nn.Linear(hidden_dim, hidden_dim)
        self.fc9 = nn.Linear(hidden_dim, len(NEIGHBORS))
        for layer in (self.fc7, self.fc8, self.fc9):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def draw_kept(self, n_images: int, generator: torch.Generator) -> None:
        """Nothing is dropped."""

    def forward(self, neighbors: Neighbors, centers: Centers, kept: None = None) -> Logits:
        """Logits over the eight labels for each (neighbor, center) pair."""
        hidden = _linear_of_pairs(self.fc7.weight, self.fc7.bias, neighbors, centers)
        hidden = self.norm(hidden.flatten(0, 1)).relu()
        return self.fc9(self.fc8(hidden).relu()).unflatten(0, neighbors.shape[:2])


def _linear_of_pairs(weight: Tensor, bias: Tensor, neighbors: Neighbors, centers: Centers) -> Float[Tensor, "b 8 h"]:
    """A linear layer of the concatenations [neighbor, center]; the center's half is computed once an image."""
    of_neighbors, of_centers = weight.chunk(2, dim=1)
    return linear(neighbors, of_neighbors) + linear(centers, of_centers, bias).unsqueeze(1)
