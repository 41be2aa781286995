"""The AlexNet-like network of Doersch et al. 2015, as in the authors' code.

All numbers are those of docs/protocols.md 2.1, column deepcontext.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import adaptive_max_pool2d

from relloc.models.backbone import Backbone

_POOL5_CHANNELS = 256
_POOL5_SIDE = 3
_FC6_DIM = 4096


def _conv3x3_norm_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    """Returns a 3x3 convolution with batch norm (without scale and shift) and ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=1, padding=1),
        nn.BatchNorm2d(out_channels, affine=False),
        nn.ReLU(),
    )


class AlexNetBackbone(Backbone):
    """conv1 to conv5 without groups as the five stages, and fc6 as the embedding of a patch.

    Batch norm without scale and shift stands on conv3, conv4, conv5 and fc6: the paper's remedy
    against collapse to a uniform answer. Max pooling rounds sizes up, as Caffe's does, so that
    pool5 of a 96 px patch is 3x3. fc6 always sees 3x3: a smaller or larger pool5 is pooled to it
    adaptively. `pooled_sides` are those of later papers' AlexNet rows (docs/protocols.md 4.6).
    """

    stage_channels = (96, 256, 384, 384, 256)
    pooled_sides = (10, 6, 5, 5, 6)
    embedding_dim = _FC6_DIM

    def __init__(self) -> None:
        super().__init__()
        # conv1 and conv2 have no batch norm: their pooled outputs are normalized across channels.
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, 96, kernel_size=11, stride=4, padding=5),
            nn.ReLU(),
        )
        self.conv2 = nn.Sequential(
            nn.Conv2d(96, 256, kernel_size=5, stride=1, padding=2),
            nn.ReLU(),
        )
        self.conv3 = _conv3x3_norm_relu(256, 384)
        self.conv4 = _conv3x3_norm_relu(384, 384)
        self.conv5 = _conv3x3_norm_relu(384, _POOL5_CHANNELS)
        self.pool = nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)
        # Local response normalization with Caffe's constants.
        self.respond = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75)
        self.fc6 = nn.Sequential(
            nn.Linear(_POOL5_CHANNELS * _POOL5_SIDE**2, _FC6_DIM),
            nn.BatchNorm1d(_FC6_DIM, affine=False),
            nn.ReLU(),
        )
        for module in self.modules():
            # Xavier weights and zero biases, as in the authors' code.
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(torch.as_tensor(module.bias))

    def layers_of_stages(self) -> list[list[nn.Module]]:
        # Pooling belongs to the stage after it: stages are probed right after their ReLU.
        pool_and_normalize = [self.pool, self.respond]
        return [
            [self.conv1],
            [*pool_and_normalize, self.conv2],
            [*pool_and_normalize, self.conv3],
            [self.conv4],
            [self.conv5],
        ]

    def embed(self, patches: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        maps = self(patches)
        pool5 = self.pool(maps["feature5"])
        # Patches of other sizes than 96 px: bring pool5 to the 3x3 that fc6 has weights for.
        fixed_size = adaptive_max_pool2d(pool5, _POOL5_SIDE)
        return self.fc6(fixed_size.flatten(1))
