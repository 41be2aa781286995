"""A frozen ResNet in which a convolution and all that follows it up to the ReLU are one kernel.

The forward of a frozen network mostly waits for memory. torch.compile leaves convolutions to cuDNN,
and reads and writes each of their results again for batch norm and ReLU. cuDNN does all of it while
it has the result at hand, and rounds to 16 bits once where these take turns.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.models.resnet import Bottleneck

from relloc.models.backbone import STAGES, Backbone
from relloc.models.resnet import ResNetBackbone

F = TypeVar("F", bound=Callable[..., Any])

# Tensor cores take channels by eights.
_ALIGNED_CHANNELS = 8


class _Convolution(NamedTuple):
    """A convolution with the batch norm behind it in its weights, as torch's functions take it."""

    weight: Tensor
    bias: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class _Block(NamedTuple):
    """A residual block: convolutions one after the other, and one beside them or None."""

    convolutions: list[_Convolution]
    shortcut: _Convolution | None


def _not_compiled(function: F) -> F:
    """Marks a function before and behind which torch.compile compiles, but not itself.

    It does not know cuDNN's functions.
    """
    disabled: Any = torch.compiler.disable(function)
    return disabled


class FusedResNet:
    """The forward of a ResNet in evaluation mode, with its weights and statistics of now.

    It returns the maps of all stages as `Backbone.forward` does, in `dtype`, and shares no memory
    with the backbone: build another one after its weights have changed.
    """

    def __init__(self, backbone: ResNetBackbone, dtype: torch.dtype = torch.bfloat16) -> None:
        self.pooled_sides = backbone.pooled_sides
        self._dtype = dtype
        self._stem = _rounded(_folded(backbone.conv1, backbone.bn1), dtype)
        self._pool: Callable[[Tensor], Tensor] = backbone.maxpool
        self._stages: list[list[_Block]] = []
        for stage in (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4):
            self._stages.append([_block(block, dtype) for block in stage])

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        feature1 = self._stem_map(images)
        # Of all that is between the convolutions, a compiler can take the pooling alone.
        pooled = self._pool(feature1)
        maps = [feature1, *self._stage_maps(pooled)]
        return dict(zip(STAGES, maps, strict=True))

    @_not_compiled
    @torch.no_grad()
    def _stem_map(self, images: Tensor) -> Tensor:
        x = images.to(self._dtype, memory_format=torch.channels_last)
        return _with_relu(x, self._stem)

    @_not_compiled
    @torch.no_grad()
    def _stage_maps(self, x: Tensor) -> list[Tensor]:
        maps = []
        for blocks in self._stages:
            for block in blocks:
                x = _residual(x, block)
            maps.append(x)
        return maps


def fused_if_possible(backbone: Backbone) -> Backbone | FusedResNet:
    """Returns a network's `FusedResNet`, or the network itself if it is of another kind."""
    if not isinstance(backbone, ResNetBackbone):
        return backbone
    if any(channels % _ALIGNED_CHANNELS for channels in backbone.stage_channels):
        return backbone
    return FusedResNet(backbone)


def _block(block: Any, dtype: torch.dtype) -> _Block:
    """Returns a residual block of torchvision with its batch norms in its convolutions."""
    pairs = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
    # The other kind, a basic block, has two convolutions.
    if isinstance(block, Bottleneck):
        pairs.append((block.conv3, block.bn3))  # pyright: ignore[reportArgumentType]
    convolutions = [_folded(conv, norm) for conv, norm in pairs]
    shortcut = None
    if block.downsample is not None:
        conv, norm = block.downsample.children()
        shortcut = _folded(conv, norm)
        # Both are added: the last convolution adds the bias of the shortcut as well.
        last = convolutions[-1]
        convolutions[-1] = last._replace(bias=last.bias + shortcut.bias)
        shortcut = _rounded(shortcut, dtype)
    return _Block([_rounded(convolution, dtype) for convolution in convolutions], shortcut)


@torch.no_grad()
def _folded(conv: Any, norm: Any) -> _Convolution:
    """Returns a convolution with the batch norm behind it, in float32."""
    weight, bias = fuse_conv_bn_weights(
        conv.weight,
        conv.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    return _Convolution(
        weight=weight.detach(),
        bias=bias.detach(),
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
    )


def _rounded(convolution: _Convolution, dtype: torch.dtype) -> _Convolution:
    """Returns a convolution in `dtype`, with channels last."""
    return convolution._replace(
        weight=convolution.weight.to(dtype, memory_format=torch.channels_last),
        bias=convolution.bias.to(dtype),
    )


def _residual(x: Tensor, block: _Block) -> Tensor:
    shortcut = x
    if block.shortcut is not None:
        shortcut = torch.conv2d(x, *block.shortcut._replace(bias=None))
    *convolutions, last = block.convolutions
    for convolution in convolutions:
        x = _with_relu(x, convolution)
    if not x.is_cuda:
        return torch.relu(torch.conv2d(x, *last) + shortcut)
    return torch.cudnn_convolution_add_relu(
        x,
        last.weight,
        shortcut,
        1.0,
        last.bias,
        last.stride,
        last.padding,
        last.dilation,
        last.groups,
    )


def _with_relu(x: Tensor, convolution: _Convolution) -> Tensor:
    if not x.is_cuda:
        return torch.relu(torch.conv2d(x, *convolution))
    return torch.cudnn_convolution_relu(x, *convolution)
