"""The best images of constellations beside a plain search of one image after another."""

import numpy as np
import pytest
import torch

from relloc.errors import UsageError
from relloc.studies import best_images as module
from relloc.studies.best_images import BestImages, best_images
from relloc.studies.patch_encoding import EncodedPatches
from relloc.studies.patch_vectors import unit_vectors

DIM = 6
COUNTS = [3, 1, 4, 1, 5, 9, 2, 6, 1, 7]  # patches of images
INDICES = [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]


def material(seed: int = 0, integers: bool = False):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(sum(COUNTS), DIM, generator=generator)
    if integers:
        features = torch.randint(0, 3, (sum(COUNTS), DIM), generator=generator).float()
    images = np.repeat(INDICES, COUNTS)
    boxes = np.stack([np.arange(len(images))] * 4, axis=1)  # each box says which patch it is of
    seeds = unit_vectors(torch.randn(4 * 3, DIM, generator=generator))
    return seeds, torch.tensor([2, 29, 4]), features, images, boxes


def in_batches(features, images, boxes, size):
    for start in range(0, len(features), size):
        rows = slice(start, start + size)
        yield EncodedPatches(
            features={"embedding": features[rows]},
            images=images[rows],
            boxes=boxes[rows],
        )


def plain(seeds, seed_images, features, images, boxes, top):
    """One constellation, image and patch after the other."""
    vectors = unit_vectors(features).double()
    rows = []
    for number, own in enumerate(seed_images.tolist()):
        four = seeds[4 * number : 4 * number + 4].double()
        found = []
        for index in INDICES:
            if index == own or {index, own} == {23, 29}:
                continue
            patches = np.flatnonzero(images == index)
            products = four @ vectors[patches].T
            best = [int(row.argmax()) for row in products]
            score = sum(float(products[patch, column]) for patch, column in enumerate(best))
            found.append((-round(score, 5), index, boxes[patches[best]].tolist()))
        rows.append(sorted(found)[:top])
    return rows


def search(size=8, top=4, *arguments, **changes) -> BestImages:
    seeds, seed_images, features, images, boxes = arguments or material()
    encoded = in_batches(features, images, boxes, size)
    sources = torch.arange(30)
    sources[29] = 23  # as image 23
    return best_images(seeds, seed_images, encoded, sources=sources, layer="embedding", top=top)


@pytest.mark.parametrize("size", [1, 5, 8, 100])
@pytest.mark.parametrize("at_once", [1, 3, 64])
def test_best_images_are_those_of_a_plain_search(size, at_once, monkeypatch):
    monkeypatch.setattr(module, "_IMAGES_AT_ONCE", at_once)
    # A few rows of products at a time
    monkeypatch.setattr(module, "_WORK_BYTES", {"cpu": 4 * 5 * size})
    found = search(size)
    for row, expected in enumerate(plain(*material(), top=4)):
        assert found.images[row].tolist() == [index for _, index, _ in expected]
        assert found.boxes[row].tolist() == [boxes for _, _, boxes in expected]
        scores = [-score for score, _, _ in expected]
        assert found.scores[row].tolist() == pytest.approx(scores, abs=2e-5)


def test_a_constellations_own_image_is_left_out_and_missing_ones_are_named():
    found = search(8, 10)
    assert found.images[0, -1] == -1
    assert 2 not in found.images[0]
    # Two images of one source
    assert 29 not in found.images[1]
    assert 23 not in found.images[1]
    assert found.images[1].tolist().count(-1) == 2
    # The third comes from an image that is not searched.
    assert sorted(found.images[2].tolist()) == INDICES
    assert found.scores[0, -1] == -torch.inf


@pytest.mark.parametrize("size", [1, 4, 100])
def test_of_equal_matches_the_earlier_patch_and_image_win(size):
    seeds, _, _, images, boxes = material()
    # All patches are the same.
    features = torch.arange(DIM).float().expand(len(images), -1)
    found = search(size, 4, seeds, torch.tensor([3, 3, 3]), features, images, boxes)
    assert found.images.tolist() == [[2, 5, 7, 11]] * 3
    first_patches = [0, 4, 8, 9]
    assert found.boxes[0, :, 0, 0].tolist() == first_patches


def test_a_flat_patch_matches_nothing():
    seeds, seed_images, features, images, boxes = material()
    features = torch.ones_like(features)
    found = search(8, 4, seeds, seed_images, features, images, boxes)
    assert (found.scores == 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_refused(bad):
    seeds, seed_images, features, images, boxes = material()
    features[7, 2] = bad
    with pytest.raises(UsageError, match="1 of 39"):
        search(8, 4, seeds, seed_images, features, images, boxes)
