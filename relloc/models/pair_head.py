"""Heads that answer where a neighbor lies relative to the center: two embeddings in, eight logits out."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from relloc.geometry import OFFSETS


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
        self.neck = nn.Sequential(
            joint,
            nn.BatchNorm1d(hidden_dim, momentum=batch_norm_momentum),
            nn.ReLU(),
            nn.Dropout(dropout),
        )
        self.answer = nn.Linear(hidden_dim, len(OFFSETS))
        for layer, std in ((joint, neck_std), (self.answer, head_std)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(joint.bias, neck_bias)

    def forward(self, neighbors: Float[Tensor, "b 8 d"], centers: Float[Tensor, "b d"]) -> Float[Tensor, "b 8 8"]:
        """Logits over the eight labels for each (neighbor, center) pair."""
        return _answer_pairs(nn.Sequential(self.neck, self.answer), self.embed(neighbors), self.embed(centers))


class AlexNetPairHead(nn.Module):
    """fc7 (batch norm without scale and shift, ReLU), fc8 (ReLU), fc9 (protocols.md 2.1, DC)."""

    def __init__(self, *, embedding_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc7 = nn.Linear(2 * embedding_dim, hidden_dim)
        self.norm = nn.BatchNorm1d(hidden_dim, affine=False)
        self.fc8 = nn.Linear(hidden_dim, hidden_dim)
        self.fc9 = nn.Linear(hidden_dim, len(OFFSETS))
        for layer in (self.fc7, self.fc8, self.fc9):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, neighbors: Float[Tensor, "b 8 d"], centers: Float[Tensor, "b d"]) -> Float[Tensor, "b 8 8"]:
        """Logits over the eight labels for each (neighbor, center) pair."""
        layers = nn.Sequential(self.fc7, self.norm, nn.ReLU(), self.fc8, nn.ReLU(), self.fc9)
        return _answer_pairs(layers, neighbors, centers)


def _answer_pairs(layers: nn.Module, neighbors: Tensor, centers: Tensor) -> Tensor:
    pairs = torch.cat([neighbors, centers.unsqueeze(1).expand_as(neighbors)], dim=2)
    return layers(pairs.flatten(0, 1)).unflatten(0, neighbors.shape[:2])
