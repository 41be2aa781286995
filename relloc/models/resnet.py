"""ResNet-18 and ResNet-50 as backbones.

The network is torchvision's, without its classifier and with its five stages named. Parameter
names are torchvision's too, so that its weight files load as they are.
"""

from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from relloc import checks
from relloc.models.backbone import Backbone

# depth -> kind of residual block, and number of blocks in each of stages 1 to 4
_ARCHITECTURES = {
    18: (BasicBlock, [2, 2, 2, 2]),
    50: (Bottleneck, [3, 4, 6, 3]),
}


class ResNetBackbone(Backbone, ResNet):
    """ResNet v1.5 without its classifier (docs/protocols.md 2.1, 3.1).

    feature1 is the stem after its ReLU and before its max pooling; feature2 to feature5 are the
    residual stages 1 to 4. A patch's embedding is the average-pooled feature5.

    Initialization is Kaiming normal with fan out, and batch-norm weights are one, also in the last
    batch norm of a block (`zero_init_residual` is off), as in mmselfsup 0.x.

    Raises:
        UsageError: `depth` is neither 18 nor 50.
    """

    pooled_sides = (12, 6, 4, 3, 2)

    def __init__(self, *, depth: int) -> None:
        checks.one_of("model.backbone.depth", depth, sorted(_ARCHITECTURES))
        block, blocks_per_stage = _ARCHITECTURES[depth]
        super().__init__(block, blocks_per_stage, zero_init_residual=False)
        # torchvision's classifier is not part of a backbone.
        self.fc = nn.Identity()
        stem_channels = 64
        residual_channels = [width * block.expansion for width in (64, 128, 256, 512)]
        self.stage_channels = (stem_channels, *residual_channels)
        self.embedding_dim = residual_channels[-1]

    def layers_of_stages(self) -> list[list[nn.Module]]:
        return [
            [self.conv1, self.bn1, self.relu],
            # The stem's max pooling belongs to the next stage: feature1 is probed before it.
            [self.maxpool, self.layer1],
            [self.layer2],
            [self.layer3],
            [self.layer4],
        ]

    def embed(self, patches: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        maps = self(patches)
        return self.avgpool(maps["feature5"]).flatten(1)
