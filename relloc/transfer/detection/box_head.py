"""Features, classes and boxes of regions: RoIAlign, the last layers, losses and detections."""

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.ops import batched_nms

from relloc.to_device import on_device
from relloc.transfer.detection.boxes import ROI_STDS, clip, decode, encode
from relloc.transfer.detection.groups import mean_over_groups
from relloc.transfer.detection.regions import Regions
from relloc.transfer.detections import Detections
from relloc.transfer.resize import Size

# Of Fast R-CNN's initial weights (Girshick 2015, section 2.3).
_SCORE_STD = 0.01
_MOVE_STD = 0.001


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectionRule:
    """Which boxes become detections. The defaults are those of mmdetection 2.28.2.

    Attributes:
        above_score: least score, which has to be exceeded.
        nms_overlap: of two boxes of a class that overlap by more than this the better is kept.
        most_per_image: number of detections of an image that are kept.
    """

    above_score: float = 0.05
    nms_overlap: float = 0.5
    most_per_image: int = 100


class BoxPredictor(nn.Module):
    """Two linear layers that score each class, and move a region's box for each class.

    Background is the last of the scores; boxes have none. Weights are drawn from N(0, 0.01) and
    N(0, 0.001), and biases are zero.
    """

    def __init__(
        self,
        channels: int,
        n_classes: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.score = nn.Linear(channels, n_classes + 1)
        self.move = nn.Linear(channels, 4 * n_classes)
        nn.init.normal_(self.score.weight, std=_SCORE_STD, generator=generator)
        nn.init.normal_(self.move.weight, std=_MOVE_STD, generator=generator)
        for layer in (self.score, self.move):
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        features: Float[Tensor, "n _"],
    ) -> tuple[Float[Tensor, "n _"], Float[Tensor, "n _ 4"]]:
        """Returns logits of classes and background, and offsets for each class, in float32."""
        n_classes = self.score.out_features - 1
        logits = self.score(features).float()
        offsets = self.move(features).float()
        return logits, offsets.view(-1, n_classes, 4)


def box_losses(
    logits: Float[Tensor, "n _"],
    offsets: Float[Tensor, "n classes 4"],
    regions: Regions,
    groups: Sequence[int],
) -> dict[str, Float[Tensor, ""]]:
    """Returns the losses `class` and `box`: cross-entropy, and L1 of the true class's offsets.

    Both are divided by the number of all regions of a group of images, though only positive ones
    have an L1 loss. `groups` are the numbers of the groups of the images.
    """
    own_offsets = of_own_class(offsets, regions)
    wanted_offsets = encode(regions.boxes, regions.object_boxes, ROI_STDS)
    errors = (own_offsets - wanted_offsets).abs()
    return mean_losses(logits, errors.sum(dim=1), regions, groups)


def of_own_class(values: Float[Tensor, "n classes 4"], regions: Regions) -> Float[Tensor, "n 4"]:
    """Returns for each region the values of its own class.

    Background has none, so those of any class stand in their place.
    """
    last_class = values.shape[1] - 1
    own_class = regions.classes.clamp(max=last_class).view(-1, 1, 1)
    return values.take_along_dim(own_class, dim=1).squeeze(1)


def mean_losses(
    logits: Float[Tensor, "n _"],
    region_losses: Float[Tensor, "n"],
    regions: Regions,
    groups: Sequence[int],
) -> dict[str, Float[Tensor, ""]]:
    """Returns the losses `class` and `box`: cross-entropy, and the mean of `region_losses`.

    Both are divided by the number of all regions of a group of images. Of `region_losses`, those of
    regions without an object do not count. `groups` are the numbers of the groups of the images.
    """
    # Whether a region is of an image. Sums over it are the same in every run, which those by
    # scattered additions on a GPU are not.
    image = torch.arange(len(groups), device=logits.device).unsqueeze(1)
    is_of_image = image == regions.images
    counts = is_of_image.sum(dim=1)

    class_losses = cross_entropy(logits, regions.classes, reduction="none")
    class_sums = torch.where(is_of_image, class_losses, 0).sum(dim=1)

    # Only regions with an object have a box to reach.
    has_loss = is_of_image & regions.positive
    box_sums = torch.where(has_loss, region_losses, 0).sum(dim=1)
    return {
        "class": mean_over_groups(class_sums, counts, groups),
        "box": mean_over_groups(box_sums, counts, groups),
    }


@torch.no_grad()
def detections(
    logits: Float[Tensor, "n _"],
    offsets: Float[Tensor, "n classes 4"],
    boxes: Float[Tensor, "n 4"],
    counts: Sequence[int],
    sizes: Sequence[Size],
    rule: DetectionRule,
) -> list[Detections]:
    """Returns the detections of each image, those of the highest score first.

    Args:
        logits: of classes and background, the last one.
        offsets: for each class.
        boxes: the regions that are scored and moved, image after image.
        counts: number of regions of each image.
        sizes: height and width of each image, to which boxes are clipped.
        rule: which boxes become detections.
    """
    n_classes = offsets.shape[1]
    # Background takes part in the softmax, but is no detection.
    shares = logits.softmax(dim=1)
    scores = shares[:, :n_classes]
    # Each class moves the region its own way.
    references = boxes.unsqueeze(1).expand_as(offsets)
    moved = decode(references, offsets, ROI_STDS)

    scores_by_image = scores.split(list(counts))
    boxes_by_image = moved.split(list(counts))
    found = []
    for image_scores, image_boxes, size in zip(
        scores_by_image,
        boxes_by_image,
        sizes,
        strict=True,
    ):
        size_on_device = on_device(size, image_boxes)
        clipped = clip(image_boxes, size_on_device)
        found.append(best_of_image(image_scores, clipped, rule))
    return found


def best_of_image(
    scores: Float[Tensor, "n classes"],
    boxes: Float[Tensor, "n classes 4"],
    rule: DetectionRule,
) -> Detections:
    """Returns the detections of one image, of its regions' scores and moved boxes."""
    # A region may become a detection of several classes (mmdetection's multiclass_nms).
    is_detection = scores > rule.above_score
    region, class_ = is_detection.nonzero(as_tuple=True)
    score = scores[region, class_]
    box = boxes[region, class_]
    # Boxes of different classes do not suppress each other. The result is in the order of falling
    # scores.
    not_suppressed = batched_nms(box, score, class_, rule.nms_overlap)
    best = not_suppressed[: rule.most_per_image]
    return Detections(
        boxes=box[best],
        scores=score[best],
        classes=class_[best],
    )
