"""The fully convolutional network of mmsegmentation 0.30's FCN-D8, on any backbone.

Sources: mmseg/models/decode_heads/fcn_head.py and decode_head.py, and configs/_base_/models/
fcn_r50-d8.py, with torchvision's ResNet-50 in the place of its deep-stem variant.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from relloc import checks
from relloc.data.annotations import VOID
from relloc.models.backbone import STAGES, Backbone
from relloc.seeds import Use, seed_for
from relloc.transfer.convolution_block import ConvolutionBlock
from relloc.transfer.dropout import SampleDropout
from relloc.transfer.segmentation.batch import SegmentationBatch

# A head's width over that of its input: 512 of 2,048 and 256 of 1,024 channels for ResNet-50, and
# 128 of 512 and 64 of 256 for ResNet-18 (configs/fcn/fcn_r18-d8_512x1024_80k_cityscapes.py).
_HEAD_SHARE = 4
# mmsegmentation's init_cfg of the classifier (decode_head.py).
_CLASSIFIER_STD = 0.01
# Class maps are written with 8 bits, of which one value is void.
_MOST_CLASSES = 255


class FcnHead(nn.Module):
    """Convolutions, and a classifier of each position of the map.

    Args:
        in_channels: of the map that the head sees; the head has a quarter of them.
        n_classes: number of classes.
        n_convolutions: of 3x3 pixels, one after the other.
        concatenates: whether one more convolution sees what these gave beside the head's input.
        dropout: probability with which a whole channel is dropped before the classifier.
        number: of this head among those of the network; dropout of each draws anew.
        generator: of the initial weights.
    """

    def __init__(
        self,
        in_channels: int,
        n_classes: int,
        *,
        n_convolutions: int,
        concatenates: bool,
        dropout: float,
        number: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        channels = max(1, in_channels // _HEAD_SHARE)
        # The first convolution narrows the map, and the others keep its width.
        blocks = []
        width = in_channels
        for _ in range(n_convolutions):
            blocks.append(ConvolutionBlock(width, channels, generator))
            width = channels
        self.convolutions = nn.Sequential(*blocks)
        # mmsegmentation's concat_input.
        self.after_concatenation = None
        if concatenates:
            joined = in_channels + channels
            self.after_concatenation = ConvolutionBlock(joined, channels, generator)
        # Whole channels, as neighboring pixels of one channel are nearly equal.
        self.dropout = SampleDropout(dropout, number, whole_channels=True)
        self.classifier = nn.Conv2d(channels, n_classes, 1)
        nn.init.normal_(self.classifier.weight, std=_CLASSIFIER_STD, generator=generator)
        self.classifier.bias = nn.Parameter(torch.zeros(n_classes))

    def forward(
        self, maps: Float[Tensor, "b c h w"], seeds: Int[Tensor, "b"] | None = None
    ) -> Float[Tensor, "b classes h w"]:
        """Returns logits. `seeds` are those of dropout, which training needs."""
        features = self.convolutions(maps)
        if self.after_concatenation is not None:
            joined = torch.cat([maps, features], dim=1)
            features = self.after_concatenation(joined)
        return self.classifier(self.dropout(features, seeds))


class FullyConvolutionalNetwork(nn.Module):
    """A dilated copy of a backbone, a head on its last stage, and one for training on stage four.

    Args:
        backbone: is copied; the network's map keeps the size of feature3.
        n_classes: number of classes, numbered from 0; at most 255.
        align_corners: whether logits are resized so that the corner pixels' centers coincide, as
            for Cityscapes at 769 px, and not the corners of the maps.
        auxiliary_weight: of the auxiliary head's loss.
        dropout: probability with which a channel is dropped before each classifier.
        seed: of the heads' initial weights.

    Raises:
        UsageError: there is no class, or there are too many for 8 bits.
    """

    def __init__(
        self,
        backbone: Backbone,
        n_classes: int,
        *,
        align_corners: bool,
        auxiliary_weight: float = 0.4,
        dropout: float = 0.1,
        seed: int,
    ) -> None:
        super().__init__()
        checks.one_of("the number of classes", n_classes, range(1, _MOST_CLASSES + 1))
        self.align_corners = align_corners
        self.auxiliary_weight = auxiliary_weight
        # The last two stages keep the resolution of the third (D8: a stride of 8 pixels).
        self.backbone = backbone.dilated()
        # A generator of its own: the weights depend on the seed, not on what was drawn before.
        generator = torch.Generator()
        generator.manual_seed(seed_for(Use.FINE_TUNING_WEIGHTS, seed))
        self.head = FcnHead(
            backbone.stage_channels[-1],
            n_classes,
            n_convolutions=2,
            concatenates=True,
            dropout=dropout,
            number=0,
            generator=generator,
        )
        self.auxiliary_head = FcnHead(
            backbone.stage_channels[-2],
            n_classes,
            n_convolutions=1,
            concatenates=False,
            dropout=dropout,
            number=1,
            generator=generator,
        )

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b classes h w"]:
        """Returns the logits of each pixel of normalized images."""
        maps = self.backbone(images)
        logits = self.head(maps[STAGES[-1]])
        return self.resized(logits, images.shape[-2:])

    def resized(
        self,
        logits: Float[Tensor, "b classes h w"],
        size: Sequence[int],
    ) -> Float[Tensor, "b classes h2 w2"]:
        """Returns logits in float32 at another height and width, interpolated bilinearly."""
        # Weights of bfloat16 would be too coarse, both here and for cross-entropy.
        return interpolate(
            logits.float(),
            size=tuple(size),
            mode="bilinear",
            align_corners=self.align_corners,
        )

    def losses(self, batch: SegmentationBatch) -> dict[str, Float[Tensor, ""]]:
        """Returns the parts of the loss, whose sum is trained on."""
        maps = self.backbone(batch.images)
        # Logits are brought to the size of the class maps, not the reverse: no pixel's class is
        # lost.
        size = batch.class_maps.shape[-2:]
        small_logits = self.head(maps[STAGES[-1]], batch.seeds)
        logits = self.resized(small_logits, size)
        decode_loss = mean_over_all_pixels(logits, batch.class_maps)

        # The auxiliary head brings gradients to the middle of the backbone, in training alone.
        small_logits = self.auxiliary_head(maps[STAGES[-2]], batch.seeds)
        logits = self.resized(small_logits, size)
        auxiliary_loss = mean_over_all_pixels(logits, batch.class_maps)
        return {
            "decode": decode_loss,
            "auxiliary": self.auxiliary_weight * auxiliary_loss,
        }

    @torch.no_grad()
    def segment(
        self,
        images: Float[Tensor, "b 3 h w"],
        out_size: Sequence[int],
    ) -> UInt8[Tensor, "b h2 w2"]:
        """Returns the most likely class of each pixel of normalized images, at another size.

        Logits are resized twice, to the size of the images and then to `out_size` (height, width),
        as in mmsegmentation. The network has to be in eval mode.
        """
        image_size_logits = self(images)
        logits = self.resized(image_size_logits, out_size)
        return logits.argmax(dim=1).to(torch.uint8)


def mean_over_all_pixels(
    logits: Float[Tensor, "b classes h w"],
    class_maps: Int[Tensor, "b h w"],
) -> Float[Tensor, ""]:
    """Returns cross-entropy summed over pixels with a class, divided by the number of all pixels.

    So padding and void pixels lower the loss, as in mmsegmentation (`avg_non_ignore=False`). The
    mean of torch's `cross_entropy` leaves them out of the denominator, too. Of no images the loss
    is NaN, but its gradients are zero.
    """
    total = cross_entropy(logits, class_maps, ignore_index=VOID, reduction="sum")
    return total / class_maps.numel()
