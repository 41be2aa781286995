"""The heads of Mask R-CNN's regions: one for class and box, one for the mask."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import relu

from relloc.transfer.convolution_block import ConvolutionBlock
from relloc.transfer.detection.box_head import BoxPredictor

# Cells of a region that each head sees, along a side.
BOX_SIDE = 7
MASK_INPUT_SIDE = 14
# Cells of a mask along a side.
MASK_SIDE = 28
_CONVOLUTIONS = 4


def _convolutions(channels: int, generator: torch.Generator) -> nn.Sequential:
    blocks = [ConvolutionBlock(channels, channels, generator) for _ in range(_CONVOLUTIONS)]
    return nn.Sequential(*blocks)


class BoxHead(nn.Module):
    """Four convolutions with batch norm, a hidden layer, and the predictor of classes and boxes.

    Weights of the hidden layer are Xavier uniform, and its biases zero.
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        n_classes: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.convolutions = _convolutions(channels, generator)
        self.hidden = nn.Linear(channels * BOX_SIDE**2, hidden)
        nn.init.xavier_uniform_(self.hidden.weight, generator=generator)
        nn.init.zeros_(self.hidden.bias)
        self.predictor = BoxPredictor(hidden, n_classes, generator)

    def forward(
        self,
        features: Float[Tensor, "n c 7 7"],
    ) -> tuple[Float[Tensor, "n _"], Float[Tensor, "n _ 4"]]:
        """Returns logits of classes and background, and offsets for each class, in float32."""
        cells = self.convolutions(features).flatten(1)
        return self.predictor(relu(self.hidden(cells)))


class MaskHead(nn.Module):
    """Four convolutions with batch norm, one that doubles the map, and a 1x1 for each class.

    Weights are Kaiming normal with fan out, and biases zero.
    """

    def __init__(self, channels: int, n_classes: int, generator: torch.Generator) -> None:
        super().__init__()
        self.convolutions = _convolutions(channels, generator)
        self.enlarge = nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2)
        self.score = nn.Conv2d(channels, n_classes, kernel_size=1)
        for layer in (self.enlarge, self.score):
            nn.init.kaiming_normal_(
                layer.weight,
                mode="fan_out",
                nonlinearity="relu",
                generator=generator,
            )
            nn.init.zeros_(torch.as_tensor(layer.bias))

    def forward(
        self,
        features: Float[Tensor, "n c 14 14"],
        classes: Int[Tensor, "n"],
    ) -> Float[Tensor, "n 28 28"]:
        """Returns the logits of each region's mask of one class, in float32."""
        hidden = relu(self.enlarge(self.convolutions(features)))
        # Only the channel of the region's class is wanted, so the 1x1 convolution is computed for
        # that class alone: maps of all 80 classes would take gigabytes in training.
        class_weights = self.score.weight.flatten(1)[classes]
        class_biases = torch.as_tensor(self.score.bias)[classes]
        cells = hidden.flatten(2)
        logits = torch.bmm(class_weights.unsqueeze(1), cells).squeeze(1)
        logits = logits.float() + class_biases.float().unsqueeze(1)
        return logits.view(len(features), MASK_SIDE, MASK_SIDE)
