"""Heads that answer questions about several patches, such as where one lies relative to another.

The embeddings of the patches of a question become logits, one for each answer. Which patches belong
together, and in which order, is decided by the caller: a head takes the embeddings by the part that
their patches have in questions, and a function that adds up what belongs to a question
(`select` and `combine` of `relloc.pretext.questions`). Of a pair the parts are the neighbor and the
center.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import linear

from relloc.geometry import NEIGHBORS

# For each part in questions: the embeddings of the patches that have it, images first
Parts = Sequence[Float[Tensor, "b *_"]]
Combine = Callable[[Sequence[Tensor]], Float[Tensor, "b questions h"]]
Logits = Float[Tensor, "b questions answers"]
# image, question, hidden unit: True where the unit is kept
DropoutMask = Bool[Tensor, "b questions h"]


class PairHead(nn.Module):
    """mmselfsup's neck and head: linear, batch norm, ReLU, dropout, linear (docs/protocols.md 2.1).

    The input of the first layer is the concatenation of the patches of a question, of a pair
    [neighbor, center]. Weights are drawn from normal distributions with standard deviations
    `neck_std` and `head_std`; biases are zero, but for `neck_bias` of the first layer. With
    `embed_dim`, a further linear layer is applied to each patch before, as in google 2019; None
    leaves it out.

    `dropout` is the probability that a hidden unit is dropped. The mask is drawn by
    `draw_dropout_mask` and passed to `forward`, so that randomness is keyed by the caller.
    `n_patches`, `n_questions` and `n_outputs` are those of `relloc.pretext.questions.Questions`, by
    default those of the eight pairs with the center.
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
        n_patches: int = 2,
        n_questions: int = len(NEIGHBORS),
        n_outputs: int = len(NEIGHBORS),
    ) -> None:
        super().__init__()
        # The first linear layer sees several patches, each after `embed` if there is one.
        patch_dim = embed_dim or embedding_dim
        self.embed = nn.Linear(embedding_dim, embed_dim) if embed_dim else nn.Identity()
        joint = nn.Linear(n_patches * patch_dim, hidden_dim)
        norm = nn.BatchNorm1d(hidden_dim, momentum=batch_norm_momentum)
        self.neck = nn.Sequential(joint, norm, nn.ReLU())
        self.dropout = dropout
        self.n_questions = n_questions
        self.answer = nn.Linear(hidden_dim, n_outputs)
        for layer, std in ((joint, neck_std), (self.answer, head_std)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(joint.bias, neck_bias)

    def draw_dropout_mask(
        self,
        n_images: int,
        generator: torch.Generator,
    ) -> DropoutMask | None:
        """Returns which hidden units dropout keeps for each question, or None without dropout."""
        if not self.dropout:
            return None
        hidden_dim = self.answer.in_features
        mask = torch.empty(
            (n_images, self.n_questions, hidden_dim),
            dtype=torch.bool,
            device=generator.device,
        )
        return mask.bernoulli_(1 - self.dropout, generator=generator)

    def forward(
        self,
        parts: Parts,
        combine: Combine,
        dropout_mask: DropoutMask | None = None,
    ) -> Logits:
        """Returns logits over the answers to each question.

        `dropout_mask` acts in training mode alone.
        """
        joint, norm, relu = self.neck
        hidden = _linear_on_questions(
            joint.weight,  # pyright: ignore[reportArgumentType]
            joint.bias,  # pyright: ignore[reportArgumentType]
            [self.embed(part) for part in parts],
            combine,
        )
        # Batch norm takes rows, so the questions of all images become one dimension, and two again.
        normalized = norm(hidden.flatten(0, 1))
        hidden = relu(normalized).unflatten(0, hidden.shape[:2])
        if self.training and dropout_mask is not None:
            # Units that stay are scaled up, so that the expected sum is the same in evaluation.
            hidden = hidden * dropout_mask / (1 - self.dropout)
        return self.answer(hidden)


class AlexNetPairHead(nn.Module):
    """The paper's head: fc7 with batch norm (no scale and shift) and ReLU, fc8 with ReLU, fc9.

    The settings are those of docs/protocols.md 2.1, column deepcontext; `n_patches` and `n_outputs`
    are as in `PairHead`, and `n_questions` decides nothing here.
    """

    def __init__(
        self,
        *,
        embedding_dim: int,
        hidden_dim: int,
        n_patches: int = 2,
        n_questions: int = len(NEIGHBORS),
        n_outputs: int = len(NEIGHBORS),
    ) -> None:
        super().__init__()
        self.fc7 = nn.Linear(n_patches * embedding_dim, hidden_dim)
        self.norm = nn.BatchNorm1d(hidden_dim, affine=False)
        self.fc8 = nn.Linear(hidden_dim, hidden_dim)
        self.fc9 = nn.Linear(hidden_dim, n_outputs)
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
        parts: Parts,
        combine: Combine,
        dropout_mask: None = None,
    ) -> Logits:
        """Returns logits over the answers to each question."""
        hidden = _linear_on_questions(self.fc7.weight, self.fc7.bias, parts, combine)
        # Batch norm takes rows: one for each question of each image.
        fc7 = self.norm(hidden.flatten(0, 1)).relu()
        fc8 = self.fc8(fc7).relu()
        return self.fc9(fc8).unflatten(0, hidden.shape[:2])


def _linear_on_questions(
    weight: Tensor,
    bias: Tensor,
    parts: Parts,
    combine: Combine,
) -> Float[Tensor, "b questions h"]:
    """Applies a linear layer to the concatenated patches of each question.

    A linear layer of a concatenation is the sum of linear layers of its parts. So each patch is
    multiplied once for each part that it has in questions, instead of once for each question: the
    center of eight pairs once for an image, and the nine patches of 72 pairs twice each.
    """
    weights = weight.chunk(len(parts), dim=1)
    projected = []
    for place, (part, weight_of_part) in enumerate(zip(parts, weights, strict=True)):
        # Each question has the bias once, with its last part.
        is_last = place == len(parts) - 1
        projected.append(linear(part, weight_of_part, bias if is_last else None))
    return combine(projected)
