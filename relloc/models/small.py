"""A small residual network that learns something on two CPU cores within minutes."""

from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from relloc.models.backbone import STAGES, Backbone

# With fewer channels torch 2.11 to 2.15 (oneDNN, on processors without AVX-512) writes beyond its
# memory in the backward of a strided 1x1 convolution in channels-last format.
_MIN_WIDTH = 8


def _downsampling_block(in_channels: int, out_channels: int) -> BasicBlock:
    """Returns a residual block that halves the rows and columns of its input."""
    shortcut = nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=2, bias=False),
        nn.BatchNorm2d(out_channels),
    )
    return BasicBlock(in_channels, out_channels, stride=2, downsample=shortcut)


class SmallBackbone(Backbone):
    """A stem of stride 4 and four residual blocks that each halve the map.

    The strides of the five stages are 4, 8, 16, 32 and 64, twice those of a ResNet. A patch's
    embedding is the average-pooled feature5. Initialization is Kaiming normal with fan out.

    `widths` are the channels of the five stages.

    Raises:
        ValueError: `widths` has another number of entries, or too few channels to train safely.
    """

    pooled_sides = (12, 6, 4, 3, 2)

    def __init__(self, *, widths: tuple[int, ...] | list[int]) -> None:
        super().__init__()
        if len(widths) != len(STAGES):
            raise ValueError(
                f"model.backbone.widths has {len(widths)} numbers, but the network has "
                f"{len(STAGES)} stages. Give one number of channels for each stage."
            )
        # The last stage is no block's input, so no strided convolution reads its channels.
        min_width = min(widths[:-1])
        if min_width < _MIN_WIDTH:
            raise ValueError(
                f"model.backbone.widths contains {min_width}. Fewer than {_MIN_WIDTH} channels "
                f"can't be trained safely with this version of torch. Give {_MIN_WIDTH} or more "
                "for all stages but the last."
            )
        self.stage_channels = tuple(widths)
        self.embedding_dim = widths[-1]
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 7, stride=4, padding=3, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
        )
        blocks = map(_downsampling_block, widths[:-1], widths[1:])
        self.blocks = nn.ModuleList(blocks)
        for module in self.modules():
            # As torchvision initializes a ResNet.
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(
                    module.weight,
                    mode="fan_out",
                    nonlinearity="relu",
                )

    def layers_of_stages(self) -> list[list[nn.Module]]:
        return [[self.stem], *([block] for block in self.blocks)]

    def embed(self, patches: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        maps = self(patches)
        return maps["feature5"].mean(dim=(2, 3))
