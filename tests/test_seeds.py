"""Every use of random numbers has its own seeds, so that no two uses draw the same numbers."""

import ast
import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import relloc
from relloc.data.views import RandomResized
from relloc.evals.training import draw_held_back
from relloc.features.augment import JitterAndLighting
from relloc.seeds import Use, seed_for, seeds_for

# Where a seed is taken as it is given, with the reason.
AS_GIVEN = {
    "data/contents.py": "which files identify a large set, the same whatever the seed",
    "data/crops.py": "the seed of a crop is part of its key",
    "data/views.py": "likewise of a view",
    "features/augment.py": "likewise of an image's colors",
    "runs/command_settings.py": "initial weights come from the plain seed, as everywhere",
    "runs/pretraining.py": "likewise",
    "runs/evaluated_models.py": "likewise",
    "pretext/loop.py": "the task's seed_of derives it",
    "patches/picture.py": "derived once, for two draws that are to be the same",
    "evals/training.py": "the order of an epoch, whose seed the caller derives",
    "transfer/detection/samples.py": "the seed of a sample is part of its key",
    "transfer/segmentation/transforms.py": "likewise",
    "transfer/voc07_finetune.py": "likewise",
    "studies/asking.py": "the seed of an image's grids is part of its key",
    "studies/constellations.py": "the seed of an image's constellations is part of its key",
    "studies/patch_sets.py": "the seed of an image's boxes is part of its key",
    "transfer/rescaling.py": "the seed of the gradient is derived by its caller",
    "studies/shortcuts/questions.py": "the seed of an image's question is derived by its caller",
    "studies/shortcuts/position.py": "likewise of the colors of its patches",
    "studies/shortcuts/reading.py": "likewise of what is cut out of it",
    "studies/shortcuts/study.py": "the side of a view, the same whatever the seed",
    "evals/squared_hinge.py": "an approximation's start, the same whatever the seed",
}


def test_a_seed_is_decided_by_its_use_and_numbers_and_has_63_mixed_bits() -> None:
    assert seed_for(Use.CROP, 1, 2, 3) == seed_for(Use.CROP, 1, 2, 3) == 11196994759102207
    different = [(1, 2), (2, 1), (1, 2, 0), (1, 20), (12,), (0, 1, 2), (2**40, 2)]
    assert len({seed_for(Use.CROP, *numbers) for numbers in different}) == len(different)
    keys = np.array([seed_for(Use.CROP, 0, 0, number) for number in range(500)], dtype=np.uint64)
    ones = np.array([((keys >> np.uint64(bit)) & np.uint64(1)).mean() for bit in range(64)])
    assert ones[63] == 0
    assert np.abs(ones[:63] - 0.5).max() < 0.1


def test_no_two_uses_share_a_seed() -> None:
    numbers = list(itertools.product(range(3), range(5), range(20)))
    seeds = [seed_for(use, *each) for use in Use for each in numbers]
    assert len(set(seeds)) == len(Use) * len(numbers)


def test_seeds_of_many_numbers_are_those_of_each() -> None:
    for first in ([], [3], [3, 0]):
        found = seeds_for(Use.AUGMENTED_VIEW, *first, last=[0, 7, 12345])
        assert found == [seed_for(Use.AUGMENTED_VIEW, *first, n) for n in (0, 7, 12345)]


@pytest.mark.parametrize("color", ["brightness", "contrast", "saturation"])
def test_the_colors_of_a_training_view_do_not_depend_on_its_box(color: str) -> None:
    crop, jitter = RandomResized(crop_px=32), JitterAndLighting()
    at = ["brightness", "contrast", "saturation"].index(color)
    areas = []
    for image in range(4000):
        box = crop.box(300, 400, random.Random(seed_for(Use.AUGMENTED_VIEW, 0, 0, image)))
        areas.append((box[2] - box[0]) * (box[3] - box[1]))
    seeds = seeds_for(Use.AUGMENTED_COLOR, 0, 0, last=range(4000))
    factors = [jitter.draw(seed)[at] for seed in seeds]
    assert abs(np.corrcoef(areas, factors)[0, 1]) < 4 / np.sqrt(
        4000
    )  # four standard deviations if independent
    seeds = seeds_for(Use.AUGMENTED_VIEW, 0, 0, last=range(4000))
    shared = [jitter.draw(seed)[0] for seed in seeds]
    assert np.corrcoef(areas, shared)[0, 1] > 0.4  # as one seed for both gives


def test_images_that_recalibrate_batch_norm_are_not_those_held_back() -> None:
    n = 2000
    order = torch.randperm(
        n, generator=torch.Generator().manual_seed(seed_for(Use.CALIBRATION_IMAGES, 7))
    )
    both = set(order[:200].tolist()) & set(draw_held_back(n, 7).tolist())
    assert 5 < len(both) < 40  # 20 by chance


def is_derived(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") == "seed_for"


def test_nothing_in_the_package_seeds_a_generator_past_the_list_of_uses() -> None:
    root = Path(relloc.__file__).parent
    seeding = {"manual_seed", "default_rng", "Random", "RandomState", "SeedSequence"}
    seeding_files = set()
    for path in root.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assigned = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and is_derived(node.value)
        ]
        names = {ast.unparse(target) for node in assigned for target in node.targets}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = (
                node.func.attr
                if isinstance(node.func, ast.Attribute)
                else getattr(node.func, "id", "")
            )
            derived = any(
                is_derived(argument) or ast.unparse(argument) in names for argument in node.args
            )
            if name in seeding and not derived:
                seeding_files.add(path.relative_to(root).as_posix())
    assert seeding_files <= set(AS_GIVEN), seeding_files - set(AS_GIVEN)


def test_every_use_is_used() -> None:
    text = "\n".join(
        path.read_text(encoding="utf-8") for path in Path(relloc.__file__).parent.rglob("*.py")
    )
    assert [use.name for use in Use if f"Use.{use.name}" not in text] == []
