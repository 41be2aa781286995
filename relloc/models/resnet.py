"""ResNet-18 and ResNet-50 as backbones.

The network is torchvision's, without its classifier and with its five stages named. Parameter
names are torchvision's too, so that its weight files load as they are.
"""

import copy
import math
from typing import cast

from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models.resnet import ResNet

from relloc import checks
from relloc.errors import UsageError
from relloc.models.backbone import Backbone
from relloc.models.ghost_batch_norm import GhostBatchNorm, kernels_take


class BasicBlock(resnet.BasicBlock):
    """torchvision's block, which can also leave sums and ReLUs to its batch norms."""

    def twice(self, x: Tensor, again: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the result for two readers, of an input for two readers.

        The batch norms are `GhostBatchNorm` in training mode, whose `with_relu` gives both.
        """
        shortcut = again if self.downsample is None else self.downsample(again)
        hidden, _ = _with_relu(self.bn1, self.conv1(x))
        return _with_relu(self.bn2, self.conv2(hidden), shortcut)


class Bottleneck(resnet.Bottleneck):
    """torchvision's block, which can also leave sums and ReLUs to its batch norms."""

    def twice(self, x: Tensor, again: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the result for two readers, as `BasicBlock.twice` does."""
        shortcut = again if self.downsample is None else self.downsample(again)
        hidden, _ = _with_relu(self.bn1, self.conv1(x))
        hidden, _ = _with_relu(self.bn2, self.conv2(hidden))
        return _with_relu(self.bn3, self.conv3(hidden), shortcut)


# depth -> kind of residual block, and number of blocks in each of stages 1 to 4
_ARCHITECTURES = {
    18: (BasicBlock, [2, 2, 2, 2]),
    50: (Bottleneck, [3, 4, 6, 3]),
}
# What comes before the residual stages: torchvision's, or one of two that keep twice as many rows
# and columns, for small patches.
STEMS = ("imagenet", "stride_1", "no_pool")
_STEM_CHANNELS = 64
# With fewer channels torch 2.11 (oneDNN, on processors without AVX-512) writes beyond its memory in
# the backward of a strided 1x1 convolution in channels-last format.
_MIN_STEM_CHANNELS = 8
# The most numbers that a stage has after pooling (docs/protocols.md 3.1).
_MOST_POOLED = 9_216


class ResNetBackbone(Backbone, ResNet):
    """ResNet v1.5 without its classifier (docs/protocols.md 2.1, 3.1).

    feature1 is the stem after its ReLU and before its max pooling; feature2 to feature5 are the
    residual stages 1 to 4. A patch's embedding is the average-pooled feature5.

    Initialization is Kaiming normal with fan out, and batch-norm weights are one, also in the last
    batch norm of a block (`zero_init_residual` is off), as in mmselfsup 0.x.

    Args:
        depth: 18 or 50 layers with weights.
        last_stride: stride of the last stage: 2 as in torchvision, or 1. A patch of 64 px has a
            last map of 2 x 2 or 4 x 4 pixels.
        stem: one of `STEMS`. "imagenet" is torchvision's, a convolution of stride 2 and a max
            pooling of stride 2; "stride_1" has a convolution of stride 1, as google 2019
            (docs/protocols.md 2.1); "no_pool" has no max pooling.
        width: the number of channels of all layers, as a multiple of the standard ones
            (Kolesnikov 2019 has 2, where its code says `filters_factor 8`).

    Strides are no weights: `last_stride` and `stem` change neither names nor shapes of tensors, and
    files of such a network load into an unchanged ResNet.

    Raises:
        UsageError: a setting is none of these, or the stem would not have a whole number of
            channels, 8 or more.
    """

    def __init__(
        self,
        *,
        depth: int,
        last_stride: int = 2,
        stem: str = "imagenet",
        width: float = 1,
    ) -> None:
        checks.one_of("model.backbone.depth", depth, sorted(_ARCHITECTURES))
        # True counts as 1 among the choices, and PyTorch takes no such stride.
        checks.whole("model.backbone.last_stride", last_stride)
        checks.one_of("model.backbone.last_stride", last_stride, (1, 2))
        checks.one_of("model.backbone.stem", stem, STEMS)
        stem_channels = _checked_stem_channels(width)
        block, blocks_per_stage = _ARCHITECTURES[depth]
        super().__init__(block, blocks_per_stage, zero_init_residual=False)
        # torchvision's classifier is not part of a backbone.
        self.fc = nn.Identity()
        if stem_channels != _STEM_CHANNELS:
            self._make_layers(block, blocks_per_stage, stem_channels)
            self.size = f"width={width:g}"
        residual_channels = [
            stem_channels * 2**number * block.expansion for number in range(len(blocks_per_stage))
        ]
        self.stage_channels = (stem_channels, *residual_channels)
        self.embedding_dim = residual_channels[-1]
        self.pooled_sides = _pooled_sides(self.stage_channels)
        self._set_strides(last_stride, stem)

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
        # In pretraining on a GPU batch norms can do at once what follows them.
        norm = self.bn1
        if isinstance(norm, GhostBatchNorm) and norm.training and kernels_take(patches):
            last_map = self._last_map(patches)
        else:
            last_map = self(patches)["feature5"]
        return self.avgpool(last_map).flatten(1)

    def with_standard_strides(self) -> Backbone:
        if not self.own_strides:
            return self
        network = copy.deepcopy(self)
        network._set_strides(last_stride=2, stem="imagenet")
        return network

    def _last_map(self, patches: Tensor) -> Tensor:
        """Returns feature5, with sums and ReLUs left to batch norms."""
        stem, _ = _with_relu(self.bn1, self.conv1(patches))
        x = again = self._pooled(stem)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x, again = cast(BasicBlock | Bottleneck, block).twice(x, again)
        return x

    def _pooled(self, stem: Tensor) -> Tensor:
        """Returns what max pooling makes of the stem's map, if the network has any, on a GPU."""
        if not isinstance(self.maxpool, nn.MaxPool2d):
            return self.maxpool(stem)
        # Triton is there on GPUs alone, and takes a while to import.
        from relloc.models.max_pool_kernel import max_pool

        return max_pool(stem, self.maxpool)

    def _make_layers(
        self,
        block: type[BasicBlock | Bottleneck],
        blocks_per_stage: list[int],
        stem_channels: int,
    ) -> None:
        """Replaces all layers by ones of another width, initialized as torchvision does it.

        torchvision's own `width_per_group` widens the 3x3 convolutions of bottlenecks alone.
        """
        self.inplanes = stem_channels
        self.conv1 = nn.Conv2d(3, stem_channels, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_channels)
        for number, n_blocks in enumerate(blocks_per_stage):
            channels = stem_channels * 2**number
            stride = 1 if number == 0 else 2
            stage = self._make_layer(block, channels, n_blocks, stride=stride)
            setattr(self, f"layer{number + 1}", stage)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _set_strides(self, last_stride: int, stem: str) -> None:
        """Sets the strides of the last stage and of the stem, whatever they were."""
        # The shortcut and a 3x3 convolution have the stride of a stage, in its first block.
        first_block = self.layer4.get_submodule("0")
        strided = "conv2" if isinstance(first_block, Bottleneck) else "conv1"
        for name in (strided, "downsample.0"):
            convolution = first_block.get_submodule(name)
            convolution.stride = (last_stride, last_stride)  # pyright: ignore[reportArgumentType]
        conv1_stride = 1 if stem == "stride_1" else 2
        self.conv1.stride = (conv1_stride, conv1_stride)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        if stem == "no_pool":
            self.maxpool = nn.Identity()
        own = []
        if last_stride != 2:
            own.append(f"last_stride={last_stride}")
        if stem != "imagenet":
            own.append(f"stem={stem}")
        self.own_strides = " ".join(own)


def _with_relu(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return cast(GhostBatchNorm, norm).with_relu(x, residual)


def _checked_stem_channels(width: float) -> int:
    """Returns the channels of a stem of `width`. Raises `UsageError` if it can't have them."""
    checks.number("model.backbone.width", width, above=0)
    channels = _STEM_CHANNELS * width
    if channels != round(channels) or channels < _MIN_STEM_CHANNELS:
        raise UsageError(
            f"model.backbone.width is {width}, which makes {channels:g} of the stem's "
            f"{_STEM_CHANNELS} channels: give a width with which these are a whole number of "
            f"{_MIN_STEM_CHANNELS} or more, such as 0.5 or 2"
        )
    return round(channels)


def _pooled_sides(stage_channels: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the published sides (12, 6, 4, 3, 2), or smaller ones of stages with more channels.

    The published ones are the largest with which no stage of a ResNet-50 has more than 9,216
    numbers; those of narrower networks stay the same.
    """
    published = (12, 6, 4, 3, 2)
    sides = []
    for channels, published_side in zip(stage_channels, published, strict=True):
        largest_side = math.isqrt(_MOST_POOLED // channels)
        sides.append(max(1, min(published_side, largest_side)))
    return tuple(sides)
