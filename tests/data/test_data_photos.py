import re
import socket
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from relloc.data.image_set import Splits
from relloc.data.photos import PhotoTiles, Tile, photos, read_photo, tiles_of

SHIPPED = OmegaConf.load(Path(__file__).parents[2] / "conf" / "data" / "photos.yaml").source
TILES, STRIDE = list(SHIPPED.tiles), SHIPPED.stride


@pytest.fixture(scope="module")
def splits() -> Splits:
    with pytest.MonkeyPatch.context() as offline:

        def refuse(*args: object, **options: object) -> None:
            raise AssertionError("nothing is downloaded")

        offline.setattr(socket, "socket", refuse)
        offline.setattr(socket, "create_connection", refuse)
        return photos(tiles=TILES, stride=STRIDE)


def covered(tiles: list[Tile], width: int, height: int) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    for tile in tiles:
        mask[tile.top : tile.top + tile.side_px, tile.left : tile.left + tile.side_px] = True
    return mask


def inside(tile: Tile, width: int, height: int) -> bool:
    return (
        min(tile.left, tile.top) >= 0
        and tile.left + tile.side_px <= width
        and tile.top + tile.side_px <= height
    )


def test_the_two_splits_share_no_pixel_and_tiles_lie_in_their_photograph(splits: Splits) -> None:
    train, held_out = splits.train, splits.held_out
    assert isinstance(train, PhotoTiles)
    assert isinstance(held_out, PhotoTiles)
    for photo in train.classes:
        size = read_photo(photo).size
        seen, unseen = (
            [tile for tile in images.tiles if tile.photo == photo] for images in (train, held_out)
        )
        assert all(inside(tile, *size) for tile in seen + unseen)
        assert not (covered(seen, *size) & covered(unseen, *size)).any()
        assert (
            covered(seen, *size) | covered(unseen, *size)
        ).mean() > 0.99  # and leave none unused


@settings(deadline=None)
@given(
    st.tuples(st.integers(1, 400), st.integers(1, 400)),
    st.lists(st.floats(0.1, 1), min_size=1, max_size=3),
    st.floats(0.3, 1.5),
)
def test_splits_of_a_photograph_of_any_size_are_disjoint(
    size: tuple[int, int], tiles: list[float], stride: float
) -> None:
    sides = {round(tile * min(size)) for tile in tiles}
    assume(min(sides) > 0)
    if 2 * max(sides) > max(size):
        with pytest.raises(ValueError, match=r"\btiles\b.*\bhalf\b"):
            tiles_of("a", *size, split="train", tiles=tiles, stride=stride)
        return
    train = tiles_of("a", *size, split="train", tiles=tiles, stride=stride)
    held_out = tiles_of("a", *size, split="held_out", tiles=tiles, stride=stride)
    assert all(inside(tile, *size) for tile in train + held_out)
    assert not (covered(train, *size) & covered(held_out, *size)).any()
    for found in (train, held_out):
        assert len(set(found)) == len(found) or len(
            {round(tile * min(size)) for tile in tiles}
        ) < len(tiles)
    assert {tile.side_px for tile in train} == {tile.side_px for tile in held_out} == sides


@pytest.mark.parametrize(
    ("tiles", "stride"),
    [([0.6], 0.2), ([1.2], 0.2), ([0.2, 0], 0.2), ([0.0005], 0.2), ([], 0.2), ([0.2], 0)],
)
def test_impossible_tiles_are_refused_with_the_numbers(tiles: list[float], stride: float) -> None:
    with pytest.raises(
        ValueError,
        match=rf"data\.source\.tiles {re.escape(str(tiles))}, stride {stride}\b.*\bhalf\b",
    ):
        photos(tiles=tiles, stride=stride)
    if tiles == [1.2]:  # long enough for two such strips, but too low for one tile
        with pytest.raises(ValueError, match="here 1000x300 px"):
            tiles_of("a", 1000, 300, split="train", tiles=tiles, stride=stride)


def test_tiles_are_shares_of_a_photograph() -> None:
    with pytest.raises(ValueError, match=r"\btiles\b.* 0 and 0\.5\b"):
        photos(tiles=[4], stride=STRIDE)


def test_tiles_are_evenly_spread_about_a_stride_apart() -> None:
    tiles = tiles_of("a", 400, 100, split="train", tiles=[0.5], stride=0.5)
    assert sorted({tile.left for tile in tiles}) == [
        0,
        25,
        50,
        75,
        100,
        125,
        150,
        175,
        200,
        225,
        250,
        275,
        300,
    ]
    assert sorted({tile.top for tile in tiles}) == [0, 25, 50]
    assert len(tiles) == len(set(tiles)) == 13 * 3


def test_an_upright_photograph_is_split_at_its_bottom() -> None:
    held_out = tiles_of("a", 100, 400, split="held_out", tiles=[0.5], stride=1)
    assert {tile.top for tile in held_out} == {350}
    assert {tile.left for tile in held_out} == {0, 50}


def test_labels_name_the_photograph_and_tiles_show_its_pixels(splits: Splits) -> None:
    assert splits.labeled
    for images in (splits.train, splits.held_out):
        assert isinstance(images, PhotoTiles)
        assert images.labels is not None
        assert set(images.labels) == set(range(10))
        for index in range(0, len(images), len(images) // 50):
            tile, photo = images.tiles[index], images.classes[images.labels[index]]
            assert images.source(index) == photo
            whole = np.asarray(read_photo(photo)) if index % 7 == 0 else None
            pixels = np.asarray(images.read(index))
            assert pixels.shape == (tile.side_px, tile.side_px, 3)
            if whole is not None:
                expected = whole[
                    tile.top : tile.top + tile.side_px, tile.left : tile.left + tile.side_px
                ]
                assert np.array_equal(pixels, expected)


def test_the_shipped_tiles_are_as_many_for_every_photograph_of_a_shape(splits: Splits) -> None:
    assert (splits.train.split, splits.held_out.split) == ("train", "held_out")
    counts = Counter(splits.train.labels or [])
    assert (
        counts[splits.train.classes.index("astronaut")]
        == counts[splits.train.classes.index("tissue")]
    )
    assert min(counts.values()) > 100


def test_photographs_are_in_color() -> None:
    for photo in PhotoTiles.classes:
        red, green, blue = np.asarray(read_photo(photo)).astype(int).transpose(2, 0, 1)
        assert np.abs(red - green).mean() + np.abs(green - blue).mean() > 5, photo


def test_the_digest_is_stable_and_tells_tilings_and_splits_apart(splits: Splits) -> None:
    again = photos(tiles=TILES, stride=STRIDE)
    assert again.train.digest() == splits.train.digest()
    assert again.held_out.digest() == splits.held_out.digest()
    other = photos(tiles=TILES, stride=0.5)
    assert len({splits.train.digest(), splits.held_out.digest(), other.train.digest()}) == 3
