"""The regions that heads are trained on, beside plain loops and in each odd case."""

import numpy as np
import plain_detection as plain
import torch
from detection_batches import batch_of, part, random_objects, rows, targets
from torch import Tensor

from relloc.seeds import Use, seed_for
from relloc.transfer.detection.batch import DetectionBatch
from relloc.transfer.detection.regions import Regions, RegionTraining, choose_regions
from relloc.transfer.detection.sampling import priorities

N_CLASSES = 3
FEW = RegionTraining(regions_per_image=16)


def random_proposals(objects: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Boxes around objects, and others."""
    far = random_objects(n, (120, 120), 2, generator).boxes
    if not len(objects):
        return far
    near = objects[torch.randint(len(objects), (n,), generator=generator)]
    moved = near + 4 * torch.randn(n, 4, generator=generator)
    moved[:, 2:] = torch.maximum(moved[:, 2:], moved[:, :2] + 1)
    return torch.cat([moved, far])


def by_loops(
    proposals: Tensor, batch: DetectionBatch, image: int, training: RegionTraining
) -> set[tuple[tuple[float, ...], int, int]]:
    """The box, class and object (or -1) of each region that is chosen of an image."""
    objects = batch.targets[image]
    candidates = rows(objects.boxes) + rows(proposals)
    table = plain.overlap_table(rows(objects.boxes), rows(proposals)).astype(np.float32)
    n_objects = len(objects.boxes)
    assigned = [*range(n_objects), *plain.assign(table, 0.5, 0.5, None)]
    ids = [*range(n_objects), *(number + (1 << 20) for number in range(len(proposals)))]
    seed = seed_for(Use.REGION_SAMPLE, batch.seeds[image])
    order = priorities([seed], torch.tensor(ids))[0].tolist()
    ranked = sorted(range(len(ids)), key=order.__getitem__)
    most_positive = int(training.regions_per_image * training.positive_share)
    positive = [number for number in ranked if assigned[number] >= 0][:most_positive]
    negative = [number for number in ranked if assigned[number] == -1]
    chosen = positive + negative[: training.regions_per_image - len(positive)]
    regions = set()
    for number in chosen:
        own = assigned[number]
        class_ = N_CLASSES if own == -1 else int(objects.classes[own])
        regions.add((tuple(candidates[number]), class_, own))
    return regions


def of_image(regions: Regions, image: int) -> set[tuple[tuple[float, ...], int, int]]:
    found = set()
    for number in (regions.images == image).nonzero().flatten().tolist():
        own = int(regions.objects[number]) if regions.positive[number] else -1
        found.add((tuple(rows(regions.boxes)[number]), int(regions.classes[number]), own))
    return found


def test_regions_are_those_of_plain_loops_and_do_not_depend_on_the_rest_of_the_batch() -> None:
    generator = torch.Generator().manual_seed(5)
    sizes = [(120, 120)] * 4
    objects = []
    for n in (3, 7, 0, 1):
        objects.append(random_objects(n, (120, 120), N_CLASSES, generator))
    batch = batch_of(sizes, objects, [11, 12, 13, 14])
    proposals = []
    for each, n in zip(objects, (10, 30, 5, 3), strict=True):
        proposals.append(random_proposals(each.boxes, n, generator))
    regions = choose_regions(proposals, batch, N_CLASSES, FEW)
    assert regions.images.tolist() == sorted(regions.images.tolist())
    for image in range(4):
        expected = by_loops(proposals[image], batch, image, FEW)
        assert of_image(regions, image) == expected
        one = slice(image, image + 1)
        alone = choose_regions(proposals[one], part(batch, one), N_CLASSES, FEW)
        assert of_image(alone, 0) == expected
    # 4 of the 16 regions are positive where there are enough candidates.
    n_positive = [int(regions.positive[regions.images == image].sum()) for image in range(4)]
    assert n_positive[:3] == [4, 4, 0]
    boxes = [batch.targets[image].boxes for image in regions.images[regions.positive]]
    own = [
        box[number] for box, number in zip(boxes, regions.objects[regions.positive], strict=True)
    ]
    assert torch.equal(torch.stack(own), regions.object_boxes[regions.positive])


def test_the_numbers_are_those_of_the_protocol() -> None:
    generator = torch.Generator().manual_seed(6)
    objects = random_objects(5, (120, 120), N_CLASSES, generator)
    proposals = [random_proposals(objects.boxes, 1000, generator)]
    batch = batch_of([(120, 120)], [objects])
    regions = choose_regions(proposals, batch, N_CLASSES, RegionTraining())
    assert len(regions.boxes) == 512
    assert regions.positive.sum() == 128


def regions_of(boxes: list[list[float]], proposals: list[list[float]]) -> Regions:
    batch = batch_of([(96, 96)], [targets(boxes, list(range(len(boxes))))])
    return choose_regions([targets(proposals).boxes], batch, N_CLASSES, RegionTraining())


def test_objects_are_regions_of_their_own_even_without_area_or_with_an_equal_one_before() -> None:
    boxes = [[3.0, 3, 20, 20], [3, 3, 20, 20], [40, 40, 40, 60]]
    regions = regions_of(boxes, [])
    assert regions.boxes.tolist() == boxes
    assert regions.classes.tolist() == [0, 1, 2]
    assert regions.objects.tolist() == [0, 1, 2]
    # A proposal that overlaps both alike belongs to the first.
    both = regions_of(boxes, [[3.0, 3, 20, 19]])
    assert both.classes.tolist() == [0, 1, 2, 0]


def test_an_overlap_of_one_half_is_enough_and_no_region_is_ignored() -> None:
    regions = regions_of([[0.0, 0, 10, 10]], [[0.0, 0, 10, 5], [0, 0, 10, 4.9], [5, 5, 5.2, 5.3]])
    assert regions.classes.tolist() == [0, 0, N_CLASSES, N_CLASSES]
    assert regions.positive.tolist() == [True, True, False, False]


def test_without_objects_all_is_background_and_without_images_nothing() -> None:
    regions = regions_of([], [[0.0, 0, 10, 5], [0, 0, 10, 4]])
    assert regions.classes.tolist() == [N_CLASSES] * 2
    assert not regions.positive.any()
    assert len(choose_regions([], batch_of([], []), N_CLASSES, FEW).boxes) == 0
    assert len(regions_of([], []).boxes) == 0
