"""Two processes, started as by torchrun, measure what one does; a shared image counts once."""

import json
import runpy
from pathlib import Path

import pytest
from commands import start

pytestmark = pytest.mark.slow

SCRIPT = """
import json
import sys
from pathlib import Path

import numpy as np
import torch

from relloc import ranks
from relloc.transfer.metrics.coco_ap import CocoImage, coco_scores
from relloc.transfer.metrics.mean_iou import SegmentationMetric
from relloc.transfer.metrics.per_image import PerImage
from relloc.transfer.metrics.voc_ap import MMDET, VocImage, average_precision

N_IMAGES, N_CLASSES = 9, 3


def boxes(generator, n):
    corners = generator.integers(0, 30, (n, 2))
    return np.concatenate([corners, corners + generator.integers(5, 30, (n, 2))], 1).astype(float)


def of_image(number):
    generator = np.random.default_rng(number)
    true = boxes(generator, 4)
    found = true[generator.integers(0, 4, 10)] + generator.integers(-2, 3, (10, 4))
    scores = generator.integers(0, 5, 10) / 5  # so that some are equal
    found_classes = generator.integers(0, N_CLASSES, 10)
    true_classes = generator.integers(0, N_CLASSES, 4)
    flags = generator.random(4) < 0.2
    voc = VocImage(
        found_boxes=found, found_scores=scores, found_classes=found_classes,
        true_boxes=true, true_classes=true_classes, difficult=flags,
    )
    coco = CocoImage(
        size=(60, 60), found_boxes=found - [0, 0, 1, 1] * found[:, [0, 1, 0, 1]],
        found_scores=scores, found_classes=found_classes, found_masks=(),
        true_boxes=true - [0, 0, 1, 1] * true[:, [0, 1, 0, 1]], true_classes=true_classes,
        crowd=flags, areas=np.full(4, 100.0), true_masks=(),
    )
    maps = torch.from_numpy(generator.integers(0, N_CLASSES, (2, 8, 8)))
    return voc, coco, maps


def measured(numbers):
    voc, coco, pixels = PerImage(), PerImage(), SegmentationMetric(N_CLASSES)
    for number in numbers:
        voc_image, coco_image, (predicted, truth) = of_image(number)
        voc.add(number, voc_image)
        coco.add(number, coco_image)
        pixels.add(number, predicted=predicted, truth=truth)
    ap = voc.evaluate(
        lambda images: average_precision(images, n_classes=N_CLASSES, definition=MMDET)
    )
    scores = coco.evaluate(lambda images: coco_scores(images, "boxes", n_classes=N_CLASSES))
    return [ap.tolist(), scores.statistics, pixels.evaluate().confusion.tolist()]


if __name__ == "__main__":
    ranks.join(torch.device("cpu"))
    folder = Path(sys.argv[1])
    # Both have image 4, as samplers do that pad the last batch.
    numbers = [8, 4, 2, 0, 6] if ranks.rank() == 0 else [1, 3, 4, 7, 5]
    of_all = measured(numbers)
    # The second process has no image at all.
    of_first = measured(range(N_IMAGES) if ranks.rank() == 0 else [])
    (folder / f"{ranks.rank()}.json").write_text(json.dumps([of_all, of_first]))
    ranks.leave()
"""


def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    script = tmp_path / "measure_two.py"
    script.write_text(SCRIPT)
    done = start(str(script), str(tmp_path), folder=tmp_path, processes=2)
    assert done.wait() == 0, done.text
    in_one = runpy.run_path(str(script))
    expected = json.loads(json.dumps(in_one["measured"](range(in_one["N_IMAGES"]))))
    ap, statistics, confusion = expected
    assert 0 < max(ap[0]) < 1
    assert 0 < statistics["AP"] < 1
    assert sum(map(sum, confusion)) == in_one["N_IMAGES"] * 64
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [expected, expected]
