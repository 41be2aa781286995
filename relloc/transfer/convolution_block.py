"""The block of which the heads of detectors and segmenters consist."""

import torch
from torch import nn


class ConvolutionBlock(nn.Sequential):
    """A 3x3 convolution without bias, batch norm, and ReLU.

    Weights are Kaiming normal with fan out, as mmcv's ConvModule initializes them.
    """

    def __init__(self, in_channels: int, channels: int, generator: torch.Generator) -> None:
        convolution = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(
            convolution.weight,
            mode="fan_out",
            nonlinearity="relu",
            generator=generator,
        )
        super().__init__(convolution, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
