"""A residual network small enough to learn something on two CPU cores in minutes."""

from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from relloc.models.backbone import STAGES, Backbone

# Of fewer channels torch 2.11 (oneDNN, on processors without AVX-512) writes beyond its memory in the backward of a
# strided 1x1 convolution in channels-last format.
_LEAST_WIDTH = 8


def _halving_block(inputs: int, outputs: int) -> BasicBlock:
    shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=2, bias=False), nn.BatchNorm2d(outputs))
    return BasicBlock(inputs, outputs, stride=2, downsample=shortcut)


class SmallBackbone(Backbone):
    """A stem of stride 4 and four residual blocks, each halving the map: strides 4 to 64, twice a ResNet's."""

    pooled_sides = (12, 6, 4, 3, 2)

    def __init__(self, *, widths: tuple[int, ...] | list[int]) -> None:
        super().__init__()
        if len(widths) != len(STAGES):
            raise ValueError(f"model.backbone.widths has {len(widths)} numbers, one a stage makes {len(STAGES)}")
        if min(widths[:-1]) < _LEAST_WIDTH:
            raise ValueError(
                f"model.backbone.widths has {min(widths[:-1])}, fewer than the {_LEAST_WIDTH} that are safe to train"
            )
        self.stage_channels = tuple(widths)
        self.embedding_dim = widths[-1]
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 7, stride=4, padding=3, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        self.blocks = nn.ModuleList(map(_halving_block, widths[:-1], widths[1:]))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def layers_of_stages(self) -> list[list[nn.Module]]:
        return [[self.stem], *([block] for block in self.blocks)]

    def embed(self, patches: Float[Tensor, "b 3 p p"]) -> Float[Tensor, "b d"]:
        return self(patches)["feature5"].mean(dim=(2, 3))
