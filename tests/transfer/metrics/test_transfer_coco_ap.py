"""COCO's statistics against pycocotools, COCO's own code."""

import contextlib
import copy
import dataclasses
import io
import json
import math
import tarfile
from typing import Any

import numpy as np
import pytest
import torch
from archives import real_images_tar
from faster_coco_eval import mask as rasterizer

from relloc.data.annotations import Mask, Objects, Polygons, RunLengths
from relloc.transfer.detections import Detections
from relloc.transfer.metrics.coco_ap import (
    STATISTICS,
    CocoImage,
    CocoScores,
    Kind,
    coco_image,
    coco_scores,
)

N_CLASSES = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """An image with its objects, as pixels."""

    size: tuple[int, int]
    found: Detections
    truth: Objects
    true_masks: list[np.ndarray]


def mask_in(box: np.ndarray, size: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
    """A mask within a box x1 y1 x2 y2, with holes at its border."""
    mask = np.zeros(size, dtype=np.uint8)
    x1, y1, x2, y2 = box.astype(int)
    mask[y1:y2, x1:x2] = generator.random((y2 - y1, x2 - x1)) < 0.9
    mask[y1, x1] = 1
    return mask


def scene(generator: np.random.Generator, n_true: int, n_found: int) -> Scene:
    """Objects of all three area ranges; detections near them, with scores of eight values."""
    size = (int(generator.integers(120, 260)), int(generator.integers(120, 260)))
    limits = np.array([size[1], size[0]])

    def boxes(n: int) -> np.ndarray:
        upper_left = generator.integers(0, limits - 20, (n, 2))
        sides = generator.integers(4, 150, (n, 2))
        return np.concatenate([upper_left, np.minimum(upper_left + sides, limits)], axis=1)

    true = boxes(n_true)
    true_classes = generator.integers(0, N_CLASSES, n_true)
    found, found_classes = boxes(n_found), generator.integers(0, N_CLASSES, n_found)
    if n_true:
        near = generator.random(n_found) < 0.8
        nearest = generator.integers(0, n_true, n_found)
        moved = true[nearest] + generator.integers(-3, 4, (n_found, 4))
        moved = np.clip(moved, 0, np.concatenate([limits, limits]))
        found[near], found_classes[near] = moved[near], true_classes[nearest][near]
    found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
    masks = [mask_in(box, size, generator) for box in found]
    true_masks = [mask_in(box, size, generator) for box in true]
    return Scene(
        size=size,
        found=Detections(
            boxes=torch.from_numpy(found).float(),
            scores=torch.from_numpy(generator.integers(0, 8, n_found) / 8).float(),
            classes=torch.from_numpy(found_classes),
            masks=torch.from_numpy(np.array(masks).reshape(-1, *size)).bool(),
        ),
        truth=Objects(
            boxes=true.astype(np.float32),
            xywh=np.concatenate([true[:, :2], true[:, 2:] - true[:, :2]], axis=1).astype(float),
            classes=true_classes,
            difficult=np.zeros(n_true, dtype=bool),
            crowd=generator.random(n_true) < 0.15,
            areas=np.array([float(mask.sum()) for mask in true_masks]),
            masks=tuple(runs_of(mask) for mask in true_masks),
        ),
        true_masks=true_masks,
    )


def runs_of(mask: np.ndarray) -> RunLengths:
    columns = mask.T.flatten()
    edges = np.flatnonzero(np.diff(columns, prepend=0))
    counts = np.diff(edges, prepend=0, append=len(columns))
    return RunLengths(counts=counts.astype(np.int64))


def scenes(seed: int, n_images: int = 14) -> list[Scene]:
    """Images with and without objects, some with more than 100 detections of a class."""
    generator = np.random.default_rng(seed)
    made = []
    for number in range(n_images):
        n_found = 400 if number == 2 else int(generator.integers(0, 12))
        made.append(scene(generator, int(generator.integers(0, 8)), n_found))
    return made


def of_scene(one: Scene) -> CocoImage:
    return coco_image(one.found, one.truth, one.size)


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    coco_masks = pytest.importorskip("pycocotools.mask")
    return coco_masks.encode(np.asfortranarray(mask))


def by_pycocotools(
    made: list[Scene], kind: Kind, n_classes: int = N_CLASSES
) -> tuple[np.ndarray, np.ndarray]:
    """The twelve statistics, and AP by class, of COCO's own code."""
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    images, annotations, results = [], [], []
    for image_id, one in enumerate(made, start=10):
        images.append({"id": image_id, "height": one.size[0], "width": one.size[1]})
        for place, box in enumerate(one.truth.xywh.tolist()):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(one.truth.classes[place]),
                    "bbox": box,
                    "area": float(one.truth.areas[place]),
                    "iscrowd": int(one.truth.crowd[place]),
                    "segmentation": run_lengths(one.true_masks[place]),
                }
            )
        for place, (x1, y1, x2, y2) in enumerate(one.found.boxes.double().tolist()):
            result: dict[str, Any] = {
                "image_id": image_id,
                "category_id": int(one.found.classes[place]),
                "score": float(one.found.scores[place]),
            }
            if kind == "masks":
                result["segmentation"] = run_lengths(one.found.masks[place].byte().numpy())
            else:
                result["bbox"] = [x1, y1, x2 - x1, y2 - y1]
            results.append(result)
    truth = coco.COCO()
    truth.dataset = {
        "info": {},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": str(number)} for number in range(n_classes)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        iou_type = "segm" if kind == "masks" else "bbox"
        evaluation = cocoeval.COCOeval(truth, truth.loadRes(copy.deepcopy(results)), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return np.array(evaluation.stats), evaluation.eval["precision"][:, :, :, 0, -1]


def statistics(scores: CocoScores) -> np.ndarray:
    """The statistics, with COCO's -1 for those that nothing was there for."""
    assert tuple(scores.statistics) == STATISTICS
    return np.nan_to_num(np.array(list(scores.statistics.values())), nan=-1)


@pytest.mark.parametrize("kind", ["boxes", "masks"])
@pytest.mark.parametrize("seed", range(6))
def test_pycocotools_says_the_same(kind: Kind, seed: int) -> None:
    made = scenes(seed)
    assert any(one.truth.crowd.any() for one in made)
    expected, precision = by_pycocotools(made, kind)
    assert expected[0] > 0.02
    scores = coco_scores([of_scene(one) for one in made], kind, n_classes=N_CLASSES)
    np.testing.assert_allclose(statistics(scores), expected, rtol=0, atol=1e-12)
    by_class = precision.mean(axis=(0, 1))
    np.testing.assert_allclose(scores.by_class, by_class, rtol=0, atol=1e-12)


def test_a_hundred_detections_of_a_class_count_in_an_image() -> None:
    made = scenes(0)
    n_of_class = np.bincount(made[2].found.classes.numpy())
    assert n_of_class.max() > 100
    by_score = np.argsort(-made[2].found.scores.numpy(), kind="stable")
    kept = []
    for number in range(N_CLASSES):
        kept += [place for place in by_score if made[2].found.classes[place] == number][:100]
    cut = {}
    for field in dataclasses.fields(Detections):
        values = getattr(made[2].found, field.name)
        cut[field.name] = None if values is None else values[kept]
    fewer = [*made[:2], dataclasses.replace(made[2], found=Detections(**cut)), *made[3:]]
    assert len(fewer[2].found.boxes) < len(made[2].found.boxes)
    all_of_them = coco_scores([of_scene(one) for one in made], "boxes", n_classes=N_CLASSES)
    first_ones = coco_scores([of_scene(one) for one in fewer], "boxes", n_classes=N_CLASSES)
    assert statistics(all_of_them).tolist() == statistics(first_ones).tolist()


@pytest.mark.parametrize("kind", ["boxes", "masks"])
def test_what_nothing_is_there_for_is_nan(kind: Kind) -> None:
    generator = np.random.default_rng(0)
    nothing = [of_scene(scene(generator, 0, 3)), of_scene(scene(generator, 0, 0))]
    for images in (nothing, []):
        scores = coco_scores(images, kind, n_classes=N_CLASSES)
        assert all(math.isnan(value) for value in scores.statistics.values())
        assert np.isnan(scores.by_class).all()


@pytest.mark.parametrize("kind", ["boxes", "masks"])
def test_nothing_found_is_zero(kind: Kind) -> None:
    generator = np.random.default_rng(0)
    missed = [of_scene(scene(generator, 6, 0))]
    scores = coco_scores(missed, kind, n_classes=N_CLASSES)
    assert scores.statistics["AP"] == scores.statistics["AR_100"] == 0


def test_masks_are_compressed_as_coco_does() -> None:
    made = scene(np.random.default_rng(3), 4, 5)
    image = of_scene(made)
    assert made.found.masks is not None
    masks = [*made.true_masks, *made.found.masks.byte().numpy()]
    encoded = [*image.true_masks, *image.found_masks]
    assert encoded == [run_lengths(mask)["counts"] for mask in masks]
    assert len(encoded) == 9


def test_masks_are_asked_for_where_they_are_evaluated() -> None:
    made = scene(np.random.default_rng(3), 4, 5)
    without = dataclasses.replace(made.found, masks=None)
    image = coco_image(without, made.truth, made.size)
    assert coco_scores([image], "boxes", n_classes=N_CLASSES).statistics["AP"] >= 0
    with pytest.raises(ValueError, match="image 0 has 0 masks for 5 detections"):
        coco_scores([image], "masks", n_classes=N_CLASSES)
    image = coco_image(made.found, dataclasses.replace(made.truth, masks=()), made.size)
    with pytest.raises(ValueError, match="image 0 has 0 masks for 4"):
        coco_scores([image], "masks", n_classes=N_CLASSES)


def test_a_score_that_is_nan_is_refused() -> None:
    made = scene(np.random.default_rng(3), 4, 5)
    scores = made.found.scores.clone()
    scores[2] = math.nan
    broken = dataclasses.replace(made, found=dataclasses.replace(made.found, scores=scores))
    with pytest.raises(ValueError, match="image 1"):
        coco_scores([of_scene(made), of_scene(broken)], "boxes", n_classes=N_CLASSES)


@pytest.mark.data
@pytest.mark.parametrize("kind", ["boxes", "masks"])
def test_real_annotations_give_what_pycocotools_says(kind: Kind) -> None:
    """Each object of COCO is found about three times, moved by up to 8 pixels."""
    with tarfile.open(real_images_tar("coco_tiny")) as tar:
        member = tar.extractfile("coco_tiny/annotations/instances_train2017.json")
        assert member is not None
        annotated = json.load(member)
    generator = np.random.default_rng(0)
    numbers = {entry["id"]: number for number, entry in enumerate(annotated["categories"])}
    made = []
    for image in sorted(annotated["images"], key=lambda image: image["id"]):
        entries = [one for one in annotated["annotations"] if one["image_id"] == image["id"]]
        made.append(real_scene(image, entries, numbers, generator))
    expected, _ = by_pycocotools(made, kind, n_classes=len(numbers))
    assert 0.02 < expected[0] < 0.9
    images = [of_scene(one) for one in made]
    scores = coco_scores(images, kind, n_classes=len(numbers))
    np.testing.assert_allclose(statistics(scores), expected, rtol=0, atol=1e-12)


def real_scene(
    image: dict[str, Any],
    entries: list[dict[str, Any]],
    numbers: dict[int, int],
    generator: np.random.Generator,
) -> Scene:
    size = (image["height"], image["width"])
    xywh = np.array([entry["bbox"] for entry in entries], dtype=float).reshape(-1, 4)
    true_masks = [pixels_of(entry["segmentation"], size) for entry in entries]
    classes = np.array([numbers[entry["category_id"]] for entry in entries], dtype=np.int64)
    corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    boxes, masks, of_found = [], [], []
    for place in generator.integers(0, len(entries), 3 * len(entries)) if entries else []:
        shift = generator.integers(-8, 9, 2)
        boxes.append(corners[place] + np.concatenate([shift, shift]))
        masks.append(np.roll(true_masks[place], shift[::-1], axis=(0, 1)))
        of_found.append(classes[place])
    return Scene(
        size=size,
        found=Detections(
            boxes=torch.tensor(np.array(boxes).reshape(-1, 4)).float(),
            scores=torch.from_numpy(generator.integers(0, 8, len(boxes)) / 8).float(),
            classes=torch.tensor(of_found, dtype=torch.int64),
            masks=torch.from_numpy(np.array(masks).reshape(-1, *size)).bool(),
        ),
        truth=Objects(
            boxes=corners.astype(np.float32),
            xywh=xywh,
            classes=classes,
            difficult=np.zeros(len(entries), dtype=bool),
            crowd=np.array([entry["iscrowd"] for entry in entries], dtype=bool),
            areas=np.array([entry["area"] for entry in entries], dtype=float),
            masks=tuple(as_annotated(entry["segmentation"]) for entry in entries),
        ),
        true_masks=true_masks,
    )


def as_annotated(segmentation: Any) -> Mask:
    if isinstance(segmentation, list):
        return Polygons(parts=tuple(np.array(part, dtype=float) for part in segmentation))
    return RunLengths(counts=np.array(segmentation["counts"], dtype=np.int64))


def pixels_of(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    encoded = rasterizer.frPyObjects(segmentation, *size)
    if isinstance(segmentation, list):
        encoded = rasterizer.merge(encoded)
    return np.ascontiguousarray(rasterizer.decode(encoded))
