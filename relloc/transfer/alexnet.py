"""The AlexNet-like network as the paper fine-tunes it (docs/protocols.md 3.12).

Batch norm is folded into the layer before it, fc6 becomes a convolution over the map of pool5, and
a convolution that reduces its channels, a pooling, and two linear layers are added.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import unfold
from torch.nn.modules.batchnorm import _BatchNorm

from relloc.errors import UsageError
from relloc.models.alexnet import AlexNetBackbone
from relloc.models.backbone import Backbone
from relloc.seeds import Use, seed_for
from relloc.transfer.dropout import SampleDropout, apply_layers

_CONV6_SIDE = 3  # the side of pool5 of a patch, all of which fc6 sees
_CONV6B_CHANNELS = 1024
_FC7_DIM = 4096
# Of pool6 on a crop of 227 px: pool5 has 7 x 7 positions, conv6 5 x 5, and pooling of 3 x 3 with
# stride 2 leaves 2 x 2. The pooling is adaptive, which is the same there, and fits other sizes.
_POOL6_SIDE = 2
# New layers as voc-classification's train_cls.py draws them.
_NEW_WEIGHT_STD = 0.01
_NEW_BIAS = 0.1
_DROPOUT = 0.5


class FineTunedAlexNet(nn.Module):
    """conv1 to pool5 as `trunk`, and conv6, conv6b, pool6, fc7 and fc8 as `head`.

    conv1 to conv6 have the weights of `backbone`, which is left as it is, in evaluation mode: batch
    norm has to have its running statistics. The other weights are drawn from N(0, 0.01) by `seed`,
    and their biases are 0.1. Dropout of a half is on the outputs of conv6 and fc7, where CaffeNet
    has it for fc6 and fc7.
    """

    def __init__(self, backbone: AlexNetBackbone, n_outputs: int, *, seed: int) -> None:
        super().__init__()
        stages = list(copy.deepcopy(backbone).stages().values())
        pool5 = copy.deepcopy(backbone.pool)
        self.trunk = nn.Sequential(*map(folded, stages), pool5)
        fc6, *_ = folded(copy.deepcopy(backbone.fc6)).children()
        conv6 = _as_convolution(fc6, backbone.stage_channels[-1])
        self.head = nn.Sequential(
            conv6,
            nn.ReLU(),
            SampleDropout(_DROPOUT, 0),
            nn.Conv2d(conv6.out_channels, _CONV6B_CHANNELS, 1),
            nn.ReLU(),
            nn.AdaptiveMaxPool2d(_POOL6_SIDE),
            nn.Flatten(),
            nn.Linear(_CONV6B_CHANNELS * _POOL6_SIDE**2, _FC7_DIM),
            nn.ReLU(),
            SampleDropout(_DROPOUT, 1),
            nn.Linear(_FC7_DIM, n_outputs),
        )
        self._generator = torch.Generator()
        self._generator.manual_seed(seed_for(Use.FINE_TUNING_WEIGHTS, seed))
        for layer in self.new_layers():
            self._draw(layer)

    def new_layers(self) -> list[nn.Conv2d | nn.Linear]:
        """Returns conv6b, fc7 and fc8, whose weights are not the backbone's."""
        layers = [m for m in self.head if isinstance(m, nn.Conv2d | nn.Linear)]
        return layers[1:]

    def draw_last_layer(self) -> None:
        """Draws the weights of fc8 once more."""
        self._draw(self.new_layers()[-1])

    def forward(
        self, images: Float[Tensor, "b 3 h w"], seeds: Int[Tensor, "b"] | None = None
    ) -> Float[Tensor, "b outputs"]:
        """Returns the outputs. `seeds` are those of dropout, which training needs."""
        pool5 = self.trunk(images)
        _check_positions(images, pool5)
        return apply_layers(self.head, pool5, seeds)

    @torch.no_grad()
    def _draw(self, layer: nn.Conv2d | nn.Linear) -> None:
        # Drawn on the CPU, wherever the layer is, so that all devices have the same weights.
        weights = torch.empty(layer.weight.shape)
        weights.normal_(std=_NEW_WEIGHT_STD, generator=self._generator)
        layer.weight.copy_(weights)
        if layer.bias is not None:
            layer.bias.fill_(_NEW_BIAS)


def calibration_forward(backbone: Backbone) -> Callable[[Tensor], Any]:
    """Returns a forward by which batch norm of a backbone is recalibrated for `FineTunedAlexNet`.

    The batch norm of fc6 then sees what it is folded into conv6 for: each window of pool5, and not
    a pool5 that is brought to the size of one window, as embeddings have it.
    """
    if not isinstance(backbone, AlexNetBackbone):
        return backbone.embed

    def forward(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "windows _"]:
        maps = backbone(images)
        pool5 = backbone.pool(maps["feature5"])
        _check_positions(images, pool5)
        return fc6_of_windows(backbone, pool5)

    return forward


def fc6_of_windows(
    backbone: AlexNetBackbone, maps: Float[Tensor, "n c h w"]
) -> Float[Tensor, "windows _"]:
    """Returns fc6, with its batch norm, of each window of maps that conv6 sees."""
    # Values of a window are in the order of fc6's weights: channels first.
    windows = unfold(maps, _CONV6_SIDE)
    return backbone.fc6(windows.transpose(1, 2).flatten(0, 1))


def _check_positions(images: Float[Tensor, "b 3 h w"], pool5: Float[Tensor, "b c h2 w2"]) -> None:
    """Checks that pool5 has a window for conv6. Raises `UsageError`."""
    height, width = pool5.shape[2:]
    if min(height, width) < _CONV6_SIDE:
        raise UsageError(
            f"pool5 of images of {images.shape[3]} x {images.shape[2]} px has {width} x "
            f"{height} positions, but conv6 needs {_CONV6_SIDE} x {_CONV6_SIDE}: give a larger "
            "crop_px, such as 227"
        )


@torch.no_grad()
def folded(layers: nn.Module) -> nn.Sequential:
    """Returns layers in sequence in which each batch norm is part of the layer before it.

    `layers` are nested `nn.Sequential`s, whose layers are changed. The result computes what they do
    in evaluation mode.

    Raises:
        ValueError: a batch norm is not behind a convolution or linear layer with biases.
    """
    kept: list[nn.Module] = []
    for module in _flattened(layers):
        if not isinstance(module, _BatchNorm):
            kept.append(module)
            continue
        before = kept[-1] if kept else None
        if not isinstance(before, nn.Conv2d | nn.Linear) or before.bias is None:
            raise ValueError(f"a batch norm can't be folded into {before}")
        if module.running_mean is None or module.running_var is None:
            raise ValueError("a batch norm without running statistics can't be folded")
        scale = torch.rsqrt(module.running_var + module.eps)
        shift = -module.running_mean * scale
        if module.affine:
            scale = scale * module.weight
            shift = shift * module.weight + module.bias
        before.weight.mul_(scale.view(-1, *(1,) * (before.weight.dim() - 1)))
        before.bias.mul_(scale).add_(shift)
    return nn.Sequential(*kept)


def _flattened(module: nn.Module) -> list[nn.Module]:
    """Returns the layers of nested sequences."""
    if not isinstance(module, nn.Sequential):
        return [module]
    layers = []
    for child in module:
        layers += _flattened(child)
    return layers


def _as_convolution(fc6: nn.Module, channels: int) -> nn.Conv2d:
    """Returns the convolution that computes at each position what fc6 computes of a patch."""
    if not isinstance(fc6, nn.Linear) or fc6.bias is None:
        raise ValueError(f"fc6 is {fc6}, and not a linear layer with biases")
    conv6 = nn.Conv2d(channels, fc6.out_features, _CONV6_SIDE)
    with torch.no_grad():
        conv6.weight.copy_(fc6.weight.view_as(conv6.weight))
        torch.as_tensor(conv6.bias).copy_(fc6.bias)
    return conv6
