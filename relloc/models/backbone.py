"""The interface of every backbone network: five named stages, and one embedding vector per patch.

Pretraining, every evaluation and every export use backbones through this interface alone, so a
new network that implements it works with all of them (docs/extending.md shows how to add one).
"""

import abc
import copy
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

STAGES = ("feature1", "feature2", "feature3", "feature4", "feature5")
# Dilation changes the stages from this index on, feature4 and feature5, as segmentation does.
_FIRST_DILATED_STAGE = 3


class Backbone(nn.Module, abc.ABC):
    """A convolutional network of five stages, one after the other, that also embeds patches.

    `forward(images)` returns the feature maps of all stages after their activation, each of shape
    (images, channels, rows, columns), by the names in `STAGES`. So any layer can be evaluated
    without hooks.

    Attributes:
        stage_channels: channels of each stage's map.
        pooled_sides: rows (and columns) of each stage's map after the pooling that evaluations
            apply (`relloc.features.pool`).
        embedding_dim: length of the vector that `embed` returns for each patch.
        size: settings by which the network has other weights than the one that its name stands for,
            such as "width=2"; "" for none.
        own_strides: settings by which it has other strides, with the same weights, such as
            "last_stride=1"; "" for none.
    """

    stage_channels: tuple[int, ...]
    pooled_sides: tuple[int, ...]
    embedding_dim: int
    size: str = ""
    own_strides: str = ""

    @abc.abstractmethod
    def layers_of_stages(self) -> Sequence[Sequence[nn.Module]]:
        """Returns, for each of the five stages, the modules that its input passes, in order."""

    @abc.abstractmethod
    def embed(self, patches: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Returns one embedding vector per patch: the input of the pretext head."""

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        """Returns the feature map of each stage by name."""
        maps = {}
        x = images
        layers_of_stages = self.layers_of_stages()
        stages = zip(STAGES, layers_of_stages, strict=True)
        for name, layers in stages:
            for layer in layers:
                x = layer(x)
            # The map after the last activation of the stage
            maps[name] = x
        return maps

    def stages(self) -> dict[str, nn.Module]:
        """Returns each stage as a module that maps the previous stage's output to its own.

        The modules share this backbone's weights. A detector may take feature1 to feature4 as its
        trunk and feature5 as its head:

            stages = list(copy.deepcopy(backbone).stages().values())
            trunk, head = nn.Sequential(*stages[:4]), stages[4]
        """
        stages: dict[str, nn.Module] = {}
        layers_of_stages = self.layers_of_stages()
        named = zip(STAGES, layers_of_stages, strict=True)
        for name, layers in named:
            # A single module needs no container around it.
            if len(layers) == 1:
                [stage] = layers
            else:
                stage = nn.Sequential(*layers)
            stages[name] = stage
        return stages

    def with_standard_strides(self) -> "Backbone":
        """Returns a network of the same weights with the strides that other projects give them.

        A network without strides of its own (`own_strides`) returns itself, others a copy.
        """
        return self

    def dilated(self) -> "Backbone":
        """Returns a copy whose last two stages keep the size of the map, for segmentation.

        Each stride of these stages becomes 1, and the convolutions after it are dilated instead,
        so that they see the same input pixels as before. Every other pixel of feature4 (every
        fourth of feature5) is therefore as it was.

        For ResNet-50 this gives strides 1, 2, 1, 1 and dilations 1, 1, 2, 4 with contracted first
        blocks, as in mmsegmentation; torchvision calls it
        `replace_stride_with_dilation=[False, True, True]`.
        """
        network = copy.deepcopy(self)
        stages = list(network.stages().values())
        # How much finer the input of the stage is sampled than in the original network.
        dilation = 1
        for stage in stages[_FIRST_DILATED_STAGE:]:
            stage_stride = 1
            for convolution in stage.modules():
                if not isinstance(convolution, nn.Conv2d):
                    continue
                conv_dilation = dilation * stage_stride
                if convolution.stride != (1, 1):
                    # The strided convolution itself still reads the undilated input of the stage.
                    # Only what comes after it sees a map with additional pixels in between.
                    conv_dilation = dilation
                    stage_stride, _ = convolution.stride
                    convolution.stride = (1, 1)
                # A kernel of one pixel sees no neighbors, so dilation means nothing to it.
                if convolution.kernel_size != (1, 1):
                    _dilate(convolution, conv_dilation)
            dilation *= stage_stride
        return network


def _dilate(convolution: nn.Conv2d, dilation: int) -> None:
    """Dilates a convolution of stride 1, which then returns a map of the size of its input."""
    convolution.dilation = (dilation, dilation)
    # "Same" padding of a dilated kernel, so that the map keeps its size.
    padding = []
    for side in convolution.kernel_size:
        half = side // 2
        padding.append(half * dilation)
    convolution.padding = tuple(padding)
