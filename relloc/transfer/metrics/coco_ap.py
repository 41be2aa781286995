"""COCO's twelve statistics of detections, for boxes and for masks.

faster-coco-eval computes them; tests compare it with pycocotools, COCO's own code. Images are
evaluated in the order they are given. For COCO this has to be the order of the images' ids, as
pycocotools sorts them: detections with equal scores keep the order of images, and within an image
their own.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval import mask as mask_codec
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from relloc.data.annotations import Objects, decode_mask
from relloc.transfer.detections import Detections

# The order in which pycocotools summarizes. AP is the mean over IoU thresholds .50, .55, … .95,
# AP50 and AP75 are at one of them; AR is recall with so many detections of a class in an image,
# the mean over the same thresholds. Small is an area below 32², large is one above 96² pixels.
STATISTICS = (
    "AP",
    "AP50",
    "AP75",
    "AP_small",
    "AP_medium",
    "AP_large",
    "AR_1",
    "AR_10",
    "AR_100",
    "AR_small",
    "AR_medium",
    "AR_large",
)
Kind = Literal["boxes", "masks"]
# COCO's value of a statistic that nothing was there for.
_NOTHING_TO_MEASURE = -1

# A mask in COCO's compressed run lengths: a few hundred bytes for most objects.
EncodedMask = bytes


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CocoImage:
    """What the statistics need of one image: `found` objects and `true` objects.

    Boxes are x y width height in pixels of the original image. Masks are empty where only boxes
    are evaluated.
    """

    size: tuple[int, int]  # height and width, in pixels
    found_boxes: Float[np.ndarray, "found 4"]
    found_scores: Float[np.ndarray, "found"]
    found_classes: Int[np.ndarray, "found"]
    found_masks: Sequence[EncodedMask]
    true_boxes: Float[np.ndarray, "true 4"]
    true_classes: Int[np.ndarray, "true"]
    crowd: Bool[np.ndarray, "true"]
    areas: Float[np.ndarray, "true"]
    true_masks: Sequence[EncodedMask]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CocoScores:
    """Statistics of one kind, from 0 to 1; nan where no true object of that size is there.

    `by_class` is AP by class, nan for a class without true objects.
    """

    statistics: dict[str, float]
    by_class: Float[np.ndarray, "classes"]


def coco_image(
    detected: Detections,
    truth: Objects,
    size: tuple[int, int],
) -> CocoImage:
    """Returns what the statistics need of an image, on the CPU, with its masks compressed.

    Args:
        detected: the objects that were found.
        truth: the annotated ones.
        size: height and width of the original image, in pixels.

    Raises:
        UnreadableImage: an annotated mask does not fill the image.
    """
    # COCO's boxes are x, y, width and height.
    corners = detected.boxes.double().cpu().numpy()
    upper_left = corners[:, :2]
    lower_right = corners[:, 2:]
    sides = lower_right - upper_left
    found_boxes = np.concatenate([upper_left, sides], axis=1)

    # Compressed now, as the masks of all images would fill gigabytes.
    found_masks: Sequence[EncodedMask] = ()
    if detected.masks is not None:
        found_masks = _encode(detected.masks)
    true_masks = []
    for mask in truth.masks:
        pixels = decode_mask(mask, *size)
        true_masks.append(_encode_one(pixels))
    return CocoImage(
        size=size,
        found_boxes=found_boxes,
        found_scores=detected.scores.double().cpu().numpy(),
        found_classes=detected.classes.cpu().numpy(),
        found_masks=found_masks,
        true_boxes=truth.xywh,
        true_classes=truth.classes,
        crowd=truth.crowd,
        areas=truth.areas,
        true_masks=true_masks,
    )


def coco_scores(images: Sequence[CocoImage], kind: Kind, *, n_classes: int) -> CocoScores:
    """Returns COCO's statistics of the boxes or of the masks.

    Args:
        images: all images of the split, sorted by id, also those without objects.
        kind: what is compared. The area of a found object is that of its box or of its mask.
        n_classes: number of classes.

    Raises:
        ValueError: an image has not as many masks as objects, or a score is nan.
    """
    for number, image in enumerate(images):
        _check(image, kind, number)
    annotations = _annotations(images, kind, n_classes)
    results = _results(images, kind)
    truth = COCO(annotations)
    found = truth.loadRes(results)
    iou_type = "bbox" if kind == "boxes" else "segm"
    evaluation = COCOeval_faster(truth, found, iouType=iou_type)

    # The three steps of COCO's protocol: match per image, join over images, average.
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    # Behind COCO's twelve statistics faster-coco-eval has some of its own.
    own_statistics = evaluation.stats[: len(STATISTICS)]
    values = _nan_if_nothing(np.array(own_statistics, dtype=np.float64))
    return CocoScores(
        statistics=dict(zip(STATISTICS, values.tolist(), strict=True)),
        by_class=_by_class(evaluation.eval["precision"]),
    )


def _check(image: CocoImage, kind: Kind, number: int) -> None:
    """Checks what COCO's code would take without a word; `number` is the image's."""
    # A sort by scores puts nan anywhere.
    if np.isnan(image.found_scores).any():
        raise ValueError(f"image {number}: a detection has nan as its score")
    if kind == "boxes":
        return
    masks_of_objects = (
        ("detections", image.found_masks, image.found_boxes),
        ("annotated objects", image.true_masks, image.true_boxes),
    )
    for name, masks, objects in masks_of_objects:
        if len(masks) != len(objects):
            raise ValueError(
                f"image {number} has {len(masks)} masks for {len(objects)} {name}: "
                "give one for each to evaluate masks"
            )


def _annotations(images: Sequence[CocoImage], kind: Kind, n_classes: int) -> dict[str, Any]:
    """Returns the true objects as COCO's annotation file has them.

    Ids are counted from 1, since 0 means no match to COCO's code.
    """
    image_entries = []
    object_entries: list[dict[str, Any]] = []
    for image_id, image in enumerate(images, start=1):
        height, width = image.size
        image_entries.append({"id": image_id, "height": height, "width": width})
        boxes = image.true_boxes.tolist()
        areas = image.areas.tolist()
        for index, (box, area) in enumerate(zip(boxes, areas, strict=True)):
            category = int(image.true_classes[index]) + 1
            entry = {
                "id": len(object_entries) + 1,
                "image_id": image_id,
                "category_id": category,
                "bbox": box,
                "area": area,
                "iscrowd": int(image.crowd[index]),
            }
            if kind == "masks":
                mask = image.true_masks[index]
                entry["segmentation"] = _run_lengths(image, mask)
            object_entries.append(entry)
    # Categories without any object are given too, so that tables by class have all rows.
    categories = []
    for number in range(1, n_classes + 1):
        categories.append({"id": number, "name": str(number)})
    return {
        "info": {},
        "images": image_entries,
        "annotations": object_entries,
        "categories": categories,
    }


def _results(images: Sequence[CocoImage], kind: Kind) -> list[dict[str, Any]]:
    """Returns the found objects as COCO's result file has them.

    With masks no boxes are given: COCO's code would take the areas of the boxes.
    """
    entries = []
    for image_id, image in enumerate(images, start=1):
        boxes = image.found_boxes.tolist()
        scores = image.found_scores.tolist()
        for index, (box, score) in enumerate(zip(boxes, scores, strict=True)):
            category = int(image.found_classes[index]) + 1
            entry: dict[str, Any] = {
                "image_id": image_id,
                "category_id": category,
                "score": score,
            }
            if kind == "masks":
                mask = image.found_masks[index]
                entry["segmentation"] = _run_lengths(image, mask)
            else:
                entry["bbox"] = box
            entries.append(entry)
    return entries


def _run_lengths(image: CocoImage, mask: EncodedMask) -> dict[str, Any]:
    """Returns a mask of an image as COCO's files have it."""
    return {"size": list(image.size), "counts": mask}


def _encode(masks: Bool[Tensor, "n h w"]) -> list[EncodedMask]:
    """Returns the masks of an image compressed."""
    if len(masks) == 0:
        return []
    # Run lengths go down the columns. Transposed on the device, nothing is left to copy here.
    transposed = masks.byte().transpose(1, 2).contiguous()
    by_column = transposed.cpu().numpy()
    # The codec takes height, width and mask, each mask column by column: a view of these bytes.
    as_codec_takes_it = by_column.transpose(2, 1, 0)
    encoded = mask_codec.encode(as_codec_takes_it)
    return [mask["counts"] for mask in encoded]


def _encode_one(mask: UInt8[np.ndarray, "h w"]) -> EncodedMask:
    """Returns one mask compressed."""
    single = mask[:, :, np.newaxis]
    by_column = np.asfortranarray(single)
    (encoded,) = mask_codec.encode(by_column)
    return encoded["counts"]


def _by_class(
    precision: Float[np.ndarray, "ious recalls classes areas limits"],
) -> Float[np.ndarray, "classes"]:
    """Returns AP by class of COCO's table of precisions: objects of all sizes, most detections."""
    # COCO's first range of areas is that of all sizes, and its last limit is 100 detections.
    of_all_sizes = precision[:, :, :, 0, -1]
    # AP is the mean over IoU thresholds and recalls.
    measured = _nan_if_nothing(of_all_sizes)
    return measured.mean(axis=(0, 1))


def _nan_if_nothing(values: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    # A -1 that is printed, or averaged, would pass for a result.
    return np.where(values == _NOTHING_TO_MEASURE, np.nan, values)
