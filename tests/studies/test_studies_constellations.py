"""Where constellations are drawn in images."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from mixed_folder import picture
from PIL import Image

from relloc.data.folder import FolderImages
from relloc.features.source import EncodeConfig
from relloc.studies.constellations import (
    SeedChoice,
    draw_constellations,
    overlap,
    patch_boxes,
)


def config(workers: int = 0) -> EncodeConfig:
    return EncodeConfig(
        batch=16,
        workers=workers,
        device=torch.device("cpu"),
        precision="fp32",
        unreadable_share=0.0,
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> FolderImages:
    folder = tmp_path_factory.mktemp("images")
    paths = []
    for number, (height, width) in enumerate(((70, 90), (64, 200), (20, 30), (123, 77))):
        paths.append(str(folder / f"{number}.png"))
        picture(height, width, seed=number).save(paths[-1])
    return FolderImages(name="made", split="train", paths=paths, labels=[], classes=())


def choice(**changes) -> SeedChoice:
    settings = {"sides_px": (12, 24), "by_gradient": True, "most_overlap": 0.3}
    return SeedChoice(**{**settings, **changes})


def gray(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.asarray(picture(height, width, seed=seed).convert("L"))


def test_boxes_of_a_constellation():
    boxes = patch_boxes(np.array([[5, 7, 10]]))
    expected = [[5, 7, 15, 17], [15, 7, 25, 17], [5, 17, 15, 27], [15, 17, 25, 27]]
    assert boxes.tolist() == [expected]


def test_overlap_of_constellations():
    assert overlap((0, 0, 5), (0, 0, 5)) == 1
    assert overlap((0, 0, 5), (10, 0, 5)) == 0
    assert overlap((0, 0, 5), (5, 0, 5)) == pytest.approx(50 / 150)
    assert overlap((0, 0, 5), (2, 3, 2)) == pytest.approx(16 / 100)


@pytest.mark.parametrize("by_gradient", [True, False])
def test_constellations_lie_in_the_image_and_overlap_little(by_gradient):
    few = choice(by_gradient=by_gradient)
    squares = few.squares(gray(70, 90), 12, seed=3)
    assert 3 < len(squares) <= 12
    assert set(squares[:, 2]) == {12, 24}
    boxes = patch_boxes(squares)
    assert boxes.min() >= 0
    assert boxes[..., 2].max() <= 90
    assert boxes[..., 3].max() <= 70
    for first, second in itertools.combinations(squares.tolist(), 2):
        assert overlap(first, second) <= 0.3
    assert few.squares(gray(70, 90), 12, seed=3).tolist() == squares.tolist()
    assert few.squares(gray(70, 90), 12, seed=4).tolist() != squares.tolist()
    # Without a limit there are as many as were asked for.
    assert len(choice(by_gradient=by_gradient, most_overlap=1).squares(gray(70, 90), 50, 3)) == 50


def test_small_images_have_only_small_constellations_or_none():
    for by_gradient in (True, False):
        small = choice(by_gradient=by_gradient, most_overlap=1)
        assert set(small.squares(gray(47, 60), 20, seed=0)[:, 2]) == {12}
        assert set(small.squares(gray(48, 60), 20, seed=0)[:, 2]) == {12, 24}
        assert small.squares(gray(23, 60), 20, seed=0).shape == (0, 3)


def test_places_are_drawn_in_proportion_to_gradient_energy():
    # Edges of 10 and 20 levels: energies 100 and 400 for each row of 8 that a square covers.
    pixels = np.zeros((8, 40), dtype=np.uint8)
    pixels[:, 10:] = 10
    pixels[:, 30:] = 30
    drawn = choice(sides_px=(4,), most_overlap=1)
    lefts = []
    for seed in range(4000):
        lefts += drawn.squares(pixels, 1, seed)[:, 0].tolist()
    # The edges are the differences of columns 9 and 29 to the next ones; no square covers both.
    energy = {}
    for left in range(33):
        energy[left] = 100 * (left <= 9 < left + 8) + 400 * (left <= 29 < left + 8)
    total = sum(energy.values())
    counts = Counter(lefts)
    assert sum(counts.values()) == 4000
    for left, value in energy.items():
        share = value / total
        deviation = (4000 * share * (1 - share)) ** 0.5
        assert counts[left] == pytest.approx(4000 * share, abs=4 * deviation + 1e-9), left
    # Uniform places do not care.
    uniform = choice(sides_px=(4,), most_overlap=1, by_gradient=False)
    lefts = {int(uniform.squares(pixels, 1, seed)[0, 0]) for seed in range(500)}
    assert lefts == set(range(33))


def test_a_flat_image_has_no_constellation_by_gradient():
    flat = np.full((60, 60), 7, dtype=np.uint8)
    assert choice().squares(flat, 3, seed=0).shape == (0, 3)
    assert len(choice(by_gradient=False, most_overlap=1).squares(flat, 3, seed=0)) == 3


def test_images_share_the_constellations_evenly_whatever_the_workers(images):
    uniform = choice(by_gradient=False, most_overlap=1)
    drawn = draw_constellations(images, range(4), 10, uniform, config=config(), seed=5)
    # The third is too small for any.
    assert list(drawn) == [0, 1, 3]
    counts = [len(squares) for squares in drawn.values()]
    assert set(counts) <= {2, 3}
    assert 7 <= sum(counts) <= 8
    again = draw_constellations(images, range(4), 10, uniform, config=config(2), seed=5)
    assert {index: squares.tolist() for index, squares in again.items()} == {
        index: squares.tolist() for index, squares in drawn.items()
    }
    other = draw_constellations(images, range(4), 10, uniform, config=config(), seed=6)
    assert drawn[0].tolist() != other[0].tolist()
    # Fewer than images
    assert len(draw_constellations(images, [0, 1, 3], 2, uniform, config=config(), seed=5)) == 2


def test_unreadable_images_are_left_out_where_they_may_be(images, tmp_path: Path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"")
    Image.new("RGB", (60, 60)).save(tmp_path / "flat.png")
    paths = [*images.paths, str(broken), str(tmp_path / "flat.png")]
    more = FolderImages(name="made", split="train", paths=paths, labels=[], classes=())
    allowed = EncodeConfig(
        batch=4, workers=0, device=torch.device("cpu"), precision="fp32", unreadable_share=0.5
    )
    drawn = draw_constellations(more, range(6), 12, choice(), config=allowed, seed=0)
    assert list(drawn) == [0, 1, 3]
