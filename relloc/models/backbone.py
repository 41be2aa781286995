"""The contract that a backbone keeps, so that every run and every evaluation can use it."""

import abc

from jaxtyping import Float
from torch import Tensor, nn

STAGES = ("feature1", "feature2", "feature3", "feature4", "feature5")


class Backbone(nn.Module, abc.ABC):
    """Five named stages, and one embedding a patch.

    `forward(images)` returns the maps (b channels rows columns) of all stages after the activation,
    by the names in STAGES, so that any layer can be probed without hooks. `pooled_sides` is the
    side of each stage's map after the evaluations' pooling.
    """

    stage_channels: tuple[int, ...]
    pooled_sides: tuple[int, ...]
    embedding_dim: int

    @abc.abstractmethod
    def embed(self, patches: Float[Tensor, "b 3 p p"]) -> Float[Tensor, "b d"]:
        """One vector a patch: what the pretext head sees."""
