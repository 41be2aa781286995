import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relloc.data.annotations import Polygons, RunLengths, decode_mask
from relloc.data.coco import counts_of_text
from relloc.data.object_table import in_hundredths
from relloc.errors import UnreadableImage

# pycocotools is older than NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")
coordinates = st.floats(-5, 70).map(lambda value: round(value, 2))
polygons = st.lists(coordinates, min_size=6, max_size=24).map(
    lambda values: values[: len(values) // 2 * 2]
)


@given(st.lists(polygons, min_size=1, max_size=3), st.integers(1, 60), st.integers(1, 60))
def test_polygons_are_drawn_as_by_pycocotools(parts: list[list[float]], height: int, width: int):
    oracle = pytest.importorskip("pycocotools.mask")
    expected = oracle.decode(oracle.merge(oracle.frPyObjects(parts, height, width)))
    mask = Polygons(parts=tuple(np.array(part) for part in parts))
    drawn = decode_mask(mask, height, width)
    assert drawn.dtype == np.uint8
    np.testing.assert_array_equal(drawn, expected)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 1000))
def test_run_lengths_are_decoded_as_by_pycocotools(height: int, width: int, seed: int):
    oracle = pytest.importorskip("pycocotools.mask")
    pixels = np.random.default_rng(seed).integers(0, 2, (height, width)).astype(np.uint8)
    encoded = oracle.encode(np.asfortranarray(pixels))
    # Compressed text, as tools for COCO write it.
    counts = counts_of_text(encoded["counts"].decode())
    assert sum(counts) == height * width
    mask = RunLengths(counts=np.array(counts, np.int64))
    np.testing.assert_array_equal(decode_mask(mask, height, width), pixels)
    # Numbers, as in COCO's own file.
    expected = oracle.frPyObjects({"counts": counts, "size": [height, width]}, height, width)
    np.testing.assert_array_equal(oracle.decode(expected), pixels)


def test_run_lengths_of_another_size_are_refused():
    mask = RunLengths(counts=np.array([3, 2, 4]))
    assert decode_mask(mask, 3, 3).T.ravel().tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 0]
    with pytest.raises(UnreadableImage, match="9 pixels, its image 12"):
        decode_mask(mask, 3, 4)


@pytest.mark.parametrize("text", ["a", "0\x00", "é"])
def test_damaged_text_of_run_lengths_is_refused(text: str):
    with pytest.raises(ValueError, match="counts"):
        counts_of_text(text)


@given(st.lists(st.decimals(-1000, 20_000, places=2), max_size=30))
def test_two_decimals_are_kept_to_the_bit_in_half_the_memory(values: list[float]):
    numbers = np.array([float(str(value)) for value in values], np.float64)
    packed = in_hundredths(numbers)
    assert packed.dtype == np.int32
    np.testing.assert_array_equal(packed / 100, numbers)


@pytest.mark.parametrize("value", [0.125, 1e9, np.nan])
def test_other_numbers_are_kept_as_they_are(value: float):
    numbers = np.array([1.25, value])
    assert in_hundredths(numbers) is numbers
