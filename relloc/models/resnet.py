"""torchvision's ResNet-18 and ResNet-50 with their five stages named; keys are torchvision's."""

from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from relloc import checks
from relloc.models.backbone import Backbone

_LAYOUT = {18: (BasicBlock, [2, 2, 2, 2]), 50: (Bottleneck, [3, 4, 6, 3])}


class ResNetBackbone(Backbone, ResNet):
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

    def layers_of_stages(self) -> list[list[nn.Module]]:
        stem = [self.conv1, self.bn1, self.relu]
        return [stem, [self.maxpool, self.layer1], [self.layer2], [self.layer3], [self.layer4]]

    def embed(self, patches: Float[Tensor, "b 3 p p"]) -> Float[Tensor, "b d"]:
        return self.avgpool(self(patches)["feature5"]).flatten(1)
