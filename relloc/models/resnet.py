"""torchvision's ResNet-18 and ResNet-50 with their five stages named; keys are torchvision's."""

from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from relloc import checks
from relloc.models.backbone import STAGES, Backbone

_LAYOUT = {18: (BasicBlock, [2, 2, 2, 2]), 50: (Bottleneck, [3, 4, 6, 3])}


class ResNetBackbone(ResNet, Backbone):
    """ResNet v1.5 without its classifier: stem after ReLU, then stages 1 to 4 (protocols.md 2.1, 3.1).

    Initialization is Kaiming normal, fan out, batch-norm weights one (zero_init_residual off), as
    in mmselfsup 0.x.
    """

    pooled_sides = (12, 6, 4, 3, 2)

    def __init__(self, *, depth: int) -> None:
        checks.one_of("model.backbone.depth", depth, sorted(_LAYOUT))
        block, layers = _LAYOUT[depth]
        super().__init__(block, layers, zero_init_residual=False)
        self.fc = nn.Identity()
        widths = [64] + [width * block.expansion for width in (64, 128, 256, 512)]
        self.stage_channels = tuple(widths)
        self.embedding_dim = widths[-1]

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        maps = [self.relu(self.bn1(self.conv1(images)))]
        x = self.maxpool(maps[0])
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            maps.append(x)
        return dict(zip(STAGES, maps, strict=True))

    def embed(self, patches: Float[Tensor, "b 3 p p"]) -> Float[Tensor, "b d"]:
        return self.avgpool(self(patches)["feature5"]).flatten(1)
