"""The AlexNet-like network of the paper, as in the author's code (protocols.md 2.1, column DC)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import adaptive_max_pool2d

from relloc.models.backbone import Backbone


def _conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs, affine=False), nn.ReLU())


class AlexNetBackbone(Backbone):
    """conv1 to conv5 without groups, and fc6 for the embedding of a patch.

    Batch norm without scale and shift on conv3, conv4, conv5 and fc6: the paper's cure against the
    collapse to a uniform answer. Pools round up as Caffe's do, so pool5 of a 96 px patch is 3x3
    and fc6 sees 3x3 always (a smaller pool5 is spread to it). The sides of the evaluations' pooled
    maps are those of later papers' AlexNet rows (protocols.md 4.6).
    """

    stage_channels = (96, 256, 384, 384, 256)
    pooled_sides = (10, 6, 5, 5, 6)
    embedding_dim = 4096

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 96, 11, 4, 5), nn.ReLU())
        self.conv2 = nn.Sequential(nn.Conv2d(96, 256, 5, 1, 2), nn.ReLU())
        self.conv3 = _conv(256, 384)
        self.conv4 = _conv(384, 384)
        self.conv5 = _conv(384, 256)
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.respond = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75)
        self.fc6 = nn.Sequential(nn.Linear(256 * 9, 4096), nn.BatchNorm1d(4096, affine=False), nn.ReLU())
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(torch.as_tensor(module.bias))

    def layers_of_stages(self) -> list[list[nn.Module]]:
        between = [self.pool, self.respond]
        return [[self.conv1], [*between, self.conv2], [*between, self.conv3], [self.conv4], [self.conv5]]

    def embed(self, patches: Float[Tensor, "b 3 p p"]) -> Float[Tensor, "b d"]:
        pool5 = self.pool(self(patches)["feature5"])
        return self.fc6(adaptive_max_pool2d(pool5, 3).flatten(1))
