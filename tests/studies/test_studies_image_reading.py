"""What is read of many images: all of them, in order, in batches of any size."""

import dataclasses
from pathlib import Path

import pytest
from made_patches import encode_config, made_images

from relloc.data.folder import FolderImages
from relloc.errors import DataError
from relloc.studies.image_reading import read_counted, read_each


@dataclasses.dataclass(frozen=True)
class Size:
    images: FolderImages

    def __call__(self, index: int, seed: int) -> tuple[int, int, int]:
        image = self.images.read(index)
        return image.height, image.width, seed


@pytest.fixture
def images(tmp_path: Path) -> FolderImages:
    return made_images(tmp_path)


@pytest.mark.parametrize(("at_once", "workers"), [(1, 0), (2, 2), (16, 1)])
def test_samples_come_in_the_order_of_keys(
    images: FolderImages, at_once: int, workers: int
) -> None:
    keys = [(3, 8), (0, 5), (1, 6), (3, 7), (0, 9)]
    found = []
    for batch in read_each(
        images, Size(images), keys, config=encode_config(workers), at_once=at_once
    ):
        assert 1 <= len(batch.samples) <= at_once
        found += zip(batch.places, batch.samples, strict=True)
    expected = [(123, 77, 8), (70, 90, 5), (64, 200, 6), (123, 77, 7), (70, 90, 9)]
    assert found == list(enumerate(expected))


def test_unreadable_images_leave_the_places_of_others_and_are_counted(
    images: FolderImages,
) -> None:
    Path(images.paths[1]).write_bytes(b"")
    keys = [(index, 0) for index in range(4)]
    read = read_each(images, Size(images), keys, config=encode_config(), at_once=3)
    assert [batch.places for batch in read] == [[0, 2], [3]]
    allowing = encode_config(unreadable_share=0.5)
    counted = list(read_counted(images, Size(images), keys, "sizes", config=allowing))
    assert [batch.places for batch in counted] == [[0, 2, 3]]
    with pytest.raises(DataError, match=r"1\.png"):
        list(read_counted(images, Size(images), keys, "sizes", config=encode_config()))


def test_progress_is_told_the_number_of_batches(images: FolderImages) -> None:
    told = []

    def progress(batches, what, total):
        told.append((what, total))
        return batches

    config = dataclasses.replace(encode_config(), progress=progress)
    keys = [(index, 0) for index in range(5)]
    assert len(list(read_counted(images, Size(images), keys, "a", config=config, at_once=2))) == 3
    assert not list(read_counted(images, Size(images), [], "b", config=config))
    assert told == [("a", 3), ("b", 0)]
