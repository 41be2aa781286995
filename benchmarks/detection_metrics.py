"""Seconds of average precision on random detections: ours, and what it replaces.

VOC: `relloc.transfer.metrics.voc_ap` matches the detections of a class in all images at once. The
other side takes one image after the other, and its detections one by one, as mmdet and detectron2
do; it is timed on the first classes only. Both have to agree.
COCO: `relloc.transfer.metrics.coco_ap`, by faster-coco-eval, and pycocotools, on boxes. Both have
to agree.
"""

import argparse
import contextlib
import io
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from report import arguments, tell

from relloc.transfer.metrics.coco_ap import CocoImage, coco_scores
from relloc.transfer.metrics.voc_ap import MMDET, VocImage, average_precision

AGREE_TO = 1e-6


def main() -> None:
    options = _options()
    generator = np.random.default_rng(0)
    images = []
    for _ in range(options.images):
        images.append(_image(generator, options, options.detections))
    coco_images = []
    for _ in range(options.coco_images):
        coco_images.append(_image(generator, options, options.coco_detections))
    rows = [*_voc(images, options), *_coco(coco_images, options)]
    per_class = [row["processor s"] / row["classes"] for row in rows]
    ratios = {
        "VOC, processor seconds of a class, loops over ours": per_class[1] / per_class[0],
        "COCO, processor seconds, pycocotools over ours": per_class[3] / per_class[2],
    }
    title = f"average precision of {options.classes} classes"
    tell(title, rows, ratios, options.json, settings=vars(options))


def _options() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--detections", type=int, default=100, help="of each class, in an image")
    parser.add_argument("--objects", type=int, default=3, help="true boxes in an image")
    parser.add_argument("--loop-classes", type=int, default=1, help="classes that the loops do")
    parser.add_argument("--coco-images", type=int, default=1000)
    parser.add_argument("--coco-detections", type=int, default=5, help="as --detections, of COCO")
    return parser.parse_args()


def _image(
    generator: np.random.Generator, options: argparse.Namespace, detections: int
) -> VocImage:
    """True boxes, and detections of which one in ten lies near one of them."""
    n_found = options.classes * detections
    true = _boxes(generator, options.objects)
    found = _boxes(generator, n_found)
    found_classes = np.repeat(np.arange(options.classes), detections)
    true_classes = generator.integers(0, options.classes, options.objects)
    near = np.flatnonzero(generator.random(n_found) < 0.1)
    nearest = generator.integers(0, options.objects, len(near))
    found[near] = true[nearest] + generator.normal(0, 8, (len(near), 4))
    found_classes[near] = true_classes[nearest]
    return VocImage(
        found_boxes=found.astype(np.float32),
        found_scores=generator.random(n_found, dtype=np.float32),
        found_classes=found_classes,
        true_boxes=true.astype(np.float32),
        true_classes=true_classes,
        difficult=generator.random(options.objects) < 0.1,
    )


def _boxes(generator: np.random.Generator, n: int) -> np.ndarray:
    corners = generator.random((n, 2)) * 300
    return np.concatenate([corners, corners + 20 + generator.random((n, 2)) * 150], axis=1)


def _voc(images: Sequence[VocImage], options: argparse.Namespace) -> list[dict[str, Any]]:
    results: dict[str, Any] = {}

    def ours() -> None:
        results["ours"] = average_precision(images, n_classes=options.classes, definition=MMDET)[0]

    def loops() -> None:
        n = options.loop_classes
        results["loops"] = [_one_by_one(images, number) for number in range(n)]

    n_found = sum(len(image.found_scores) for image in images)
    rows = [
        _timed("VOC, ours", ours, len(images), n_found, options.classes),
        _timed("VOC, loops", loops, len(images), n_found, options.loop_classes),
    ]
    apart = np.abs(results["ours"][: options.loop_classes] - results["loops"]).max()
    if apart > AGREE_TO:
        raise SystemExit(f"the loops give another average precision: {apart} apart")
    return rows


def _timed(
    name: str, work: Callable[[], None], n_images: int, n_found: int, n_classes: int
) -> dict[str, Any]:
    started, processor_started = time.perf_counter(), time.process_time()
    work()
    return {
        "": name,
        "images": n_images,
        "detections": n_found,
        "classes": n_classes,
        "s": time.perf_counter() - started,
        "processor s": time.process_time() - processor_started,
    }


def _one_by_one(images: Sequence[VocImage], number: int) -> float:
    scores, right, wrong = [], [], []
    n_to_find = 0
    for image in images:
        is_true = image.true_classes == number
        true, difficult = image.true_boxes[is_true], image.difficult[is_true]
        ordinary_first = np.argsort(difficult, kind="stable")
        true, difficult = true[ordinary_first], difficult[ordinary_first]
        n_to_find += int((~difficult).sum())
        is_found = image.found_classes == number
        by_score = np.argsort(-image.found_scores[is_found], kind="stable")
        taken = np.zeros(len(true), dtype=bool)
        for place in np.flatnonzero(is_found)[by_score]:
            scores.append(image.found_scores[place])
            overlaps = _overlaps(image.found_boxes[place], true)
            best = int(overlaps.argmax()) if len(true) else -1
            is_near = best >= 0 and overlaps[best] >= 0.5
            counts = not (is_near and difficult[best])
            right.append(is_near and counts and not taken[best])
            wrong.append(counts and not right[-1])
            if right[-1]:
                taken[best] = True
    order = np.argsort(-np.array(scores), kind="stable")
    n_right, n_wrong = np.cumsum(np.array(right)[order]), np.cumsum(np.array(wrong)[order])
    recall, precision = n_right / n_to_find, n_right / np.maximum(n_right + n_wrong, 1)
    points = [precision[recall >= point].max(initial=0) for point in np.arange(0, 1.001, 0.1)]
    return float(np.mean(points))


def _overlaps(box: np.ndarray, true: np.ndarray) -> np.ndarray:
    width = np.minimum(box[2], true[:, 2]) - np.maximum(box[0], true[:, 0]) + 1
    height = np.minimum(box[3], true[:, 3]) - np.maximum(box[1], true[:, 1]) + 1
    shared = np.maximum(width, 0) * np.maximum(height, 0)
    area = (box[2] - box[0] + 1) * (box[3] - box[1] + 1)
    true_areas = (true[:, 2] - true[:, 0] + 1) * (true[:, 3] - true[:, 1] + 1)
    return shared / (area + true_areas - shared)


def _coco(images: Sequence[VocImage], options: argparse.Namespace) -> list[dict[str, Any]]:
    converted = [_coco_image(image) for image in images]
    results: dict[str, Any] = {}

    def ours() -> None:
        scores = coco_scores(converted, "boxes", n_classes=options.classes)
        results["ours"] = list(scores.statistics.values())

    def theirs() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            results["theirs"] = _by_pycocotools(converted, options.classes)

    n_found = sum(len(image.found_scores) for image in images)
    rows = [
        _timed("COCO, ours", ours, len(images), n_found, options.classes),
        _timed("COCO, pycocotools", theirs, len(images), n_found, options.classes),
    ]
    apart = np.abs(np.nan_to_num(results["ours"], nan=-1) - results["theirs"]).max()
    if apart > AGREE_TO:
        raise SystemExit(f"pycocotools gives other statistics: {apart} apart")
    return rows


def _coco_image(image: VocImage) -> CocoImage:
    true_boxes = _xywh(image.true_boxes)
    return CocoImage(
        size=(480, 480),
        found_boxes=_xywh(image.found_boxes),
        found_scores=image.found_scores,
        found_classes=image.found_classes,
        found_masks=(),
        true_boxes=true_boxes,
        true_classes=image.true_classes,
        crowd=image.difficult,
        areas=true_boxes[:, 2] * true_boxes[:, 3],
        true_masks=(),
    )


def _xywh(boxes: np.ndarray) -> np.ndarray:
    corners = boxes.astype(np.float64)
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)


def _by_pycocotools(images: Sequence[CocoImage], n_classes: int) -> np.ndarray:
    annotations, results = [], []
    for image_id, image in enumerate(images):
        for place, box in enumerate(image.true_boxes.tolist()):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(image.true_classes[place]),
                    "bbox": box,
                    "area": float(image.areas[place]),
                    "iscrowd": int(image.crowd[place]),
                }
            )
        for place, box in enumerate(image.found_boxes.tolist()):
            results.append(
                {
                    "image_id": image_id,
                    "category_id": int(image.found_classes[place]),
                    "bbox": box,
                    "score": float(image.found_scores[place]),
                }
            )
    # Not COCO by its type stubs, which demand fields that it never reads and a file of results
    truth: Any = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": image_id} for image_id in range(len(images))],
        "categories": [{"id": number} for number in range(n_classes)],
        "annotations": annotations,
    }
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return np.array(evaluation.stats)


if __name__ == "__main__":
    main()
