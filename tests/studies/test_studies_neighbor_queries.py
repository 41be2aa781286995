"""Which patches are queries: random ones, and those that a user chooses."""

import pytest
import torch

from relloc.data.folder import FolderImages
from relloc.errors import UsageError
from relloc.studies.neighbor_queries import check_chosen, draw_queries, find_image


def test_queries_are_of_different_sources_and_depend_on_the_seed() -> None:
    groups = torch.tensor([0, 0, 1, 2, 1, 3, 3, 3])
    rows = draw_queries(groups, 3, seed=1)
    assert len(set(groups[rows].tolist())) == 3
    assert draw_queries(groups, 3, seed=1).equal(rows)
    assert draw_queries(groups, 2, seed=1).equal(rows[:2])
    every = draw_queries(groups, 99, seed=1)
    assert sorted(groups[every].tolist()) == [0, 1, 2, 3]
    drawn = [draw_queries(groups, 4, seed=seed) for seed in range(200)]
    assert set(torch.cat(drawn).tolist()) == set(range(8))


@pytest.mark.parametrize(
    ("name", "index"), [("b/1.jpg", 2), ("2.jpg", 1), ("x/a/1.jpg", 0), (1, 1), ("/x/2.jpg", 1)]
)
def test_images_are_found_by_number_or_the_end_of_their_path(name: str | int, index: int) -> None:
    paths = ["/x/a/1.jpg", "/x/2.jpg", "/x/b/1.jpg"]
    images = FolderImages(name="made", split="train", paths=paths, labels=[], classes=())
    assert find_image(images, name, "study.neighbors.chosen[0].image") == index


@pytest.mark.parametrize("name", ["1.jpg", "3.jpg", ".jpg", 3])
def test_images_that_are_not_there_or_ambiguous_are_refused(name: str | int) -> None:
    paths = ["/x/a/1.jpg", "/x/2.jpg", "/x/b/1.jpg"]
    images = FolderImages(name="made", split="train", paths=paths, labels=[], classes=())
    with pytest.raises(UsageError, match=r"chosen\[0\]\.image is "):
        find_image(images, name, "study.neighbors.chosen[0].image")


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("a.jpg", r"chosen\[0\]"),
        ({"image": "a.jpg"}, r"chosen\[0\]"),
        ({"image": "a.jpg", "box": [0, 0, 5, 5], "layer": "x"}, r"chosen\[0\]"),
        ({"image": -1, "box": [0, 0, 5, 5]}, r"chosen\[0\]\.image"),
        ({"image": 1.5, "box": [0, 0, 5, 5]}, r"chosen\[0\]\.image"),
        ({"image": "a.jpg", "box": [0, 0, 5]}, r"chosen\[0\]\.box"),
        ({"image": "a.jpg", "box": [0, 5, 5, 5]}, r"chosen\[0\]\.box"),
        ({"image": "a.jpg", "box": [0, 0, 5, 5.5]}, r"chosen\[0\]\.box"),
    ],
)
def test_wrong_queries_are_told_by_number(query: object, named: str) -> None:
    with pytest.raises(UsageError, match=rf"study\.neighbors\.{named} is "):
        check_chosen("study.neighbors.chosen", [query])
