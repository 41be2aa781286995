"""The contract that a backbone keeps, so that every run and every evaluation can use it."""

import abc
import copy
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

STAGES = ("feature1", "feature2", "feature3", "feature4", "feature5")


class Backbone(nn.Module, abc.ABC):
    """Five named stages, one after the other, and one embedding a patch.

    `forward(images)` returns the maps (b channels rows columns) of all stages after the activation,
    by the names in STAGES, so that any layer can be probed without hooks. `pooled_sides` is the
    side of each stage's map after the evaluations' pooling.
    """

    stage_channels: tuple[int, ...]
    pooled_sides: tuple[int, ...]
    embedding_dim: int

    @abc.abstractmethod
    def layers_of_stages(self) -> Sequence[Sequence[nn.Module]]:
        """For each stage the modules that its input passes, in order."""

    @abc.abstractmethod
    def embed(self, patches: Float[Tensor, "b 3 p p"]) -> Float[Tensor, "b d"]:
        """One vector a patch: what the pretext head sees."""

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        maps = {}
        x = images
        for name, layers in zip(STAGES, self.layers_of_stages(), strict=True):
            for layer in layers:
                x = layer(x)
            maps[name] = x
        return maps

    def stages(self) -> dict[str, nn.Module]:
        """Each stage as a module that takes the map of the stage before, with this backbone's own weights.

        A detector may take feature1 to feature4 as its trunk and feature5 as its head:

            stages = list(copy.deepcopy(backbone).stages().values())
            trunk, head = nn.Sequential(*stages[:4]), stages[4]
        """
        layers = zip(STAGES, self.layers_of_stages(), strict=True)
        return {name: of_stage[0] if len(of_stage) == 1 else nn.Sequential(*of_stage) for name, of_stage in layers}

    def dilated(self) -> "Backbone":
        """A copy whose last two stages do not shrink the map any further; for segmentation.

        Where they had a stride, all convolutions after it look further apart instead. Every other
        pixel (every fourth of feature5) is as it was. For ResNet-50 these are strides 1, 2, 1, 1 and
        dilations 1, 1, 2, 4 with contracted first blocks, as in mmsegmentation, which torchvision calls
        replace_stride_with_dilation=[False, True, True].
        """
        copied = copy.deepcopy(self)
        distance = 1
        for stage in list(copied.stages().values())[3:]:
            stride = 1
            for convolution in stage.modules():
                if not isinstance(convolution, nn.Conv2d):
                    continue
                reach = distance * stride
                if convolution.stride != (1, 1):
                    # It still looks as far as the stage before: what it skipped lies between.
                    reach, stride = distance, convolution.stride[0]
                    convolution.stride = (1, 1)
                if convolution.kernel_size != (1, 1):
                    convolution.dilation = (reach, reach)
                    convolution.padding = tuple(side // 2 * reach for side in convolution.kernel_size)
            distance *= stride
        return copied
