import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from relloc.data.image_set import ImageSet
from relloc.data.subsets import Subset, _quotas, evenly_spaced, list_names, listed, stratified
from relloc.errors import DataError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Named:
    """An `ImageSet` of flat images, each of the gray level of its number."""

    names: Sequence[str]
    labels: Sequence[int] | None
    name: str = "named"
    split: str = "train"
    classes: tuple[str, ...] = ("a", "b", "c")

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> Image.Image:
        return Image.new("RGB", (4, 4), (index, index, index))

    def source(self, index: int) -> str:
        return self.names[index]

    def digest(self) -> str:
        return str(hash(tuple(self.names)))


def named(sizes: Sequence[int], folder: str = "/data") -> Named:
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    return Named(
        names=[f"{folder}/{label}/{label}_{place}.jpg" for place, label in enumerate(labels)],
        labels=labels,
    )


def files(subset: Subset) -> set[str]:
    return {Path(subset.source(index)).name for index in range(len(subset))}


def test_a_subset_is_the_images_at_its_indices() -> None:
    whole = named([3, 4])
    subset = Subset(images=whole, indices=[5, 0])
    assert isinstance(subset, ImageSet)
    assert (len(subset), subset.labels, subset.classes) == (2, [1, 0], whole.classes)
    assert subset.read(0).getpixel((0, 0)) == (5, 5, 5)
    assert subset.source(1) == "/data/0/0_0.jpg"
    assert Subset(images=dataclasses.replace(whole, labels=None), indices=[5, 0]).labels is None


def test_digests_tell_subsets_apart_and_the_hash_of_the_list_does_not_ask_where_images_lie() -> (
    None
):
    whole = named([3, 4])
    some, other, same = (
        Subset(images=whole, indices=indices) for indices in ([5, 0], [5, 1], [0, 5])
    )
    assert len({one.digest() for one in (some, other, same)}) == 3
    assert some.list_hash() == same.list_hash() != other.list_hash()
    assert (
        Subset(images=named([3, 4], "/elsewhere"), indices=[5, 0]).list_hash() == some.list_hash()
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.floats(0.01, 1), st.integers(0, 3))
def test_a_share_has_its_size_and_each_class_its_part(
    sizes: list[int], share: float, seed: int
) -> None:
    whole = named(sizes)
    subset = stratified(whole, share, seed=seed)
    found = Counter(subset.labels or ())
    assert list(subset.indices) == sorted(set(subset.indices))
    for label, size in enumerate(sizes):
        assert 1 <= found[label] <= size
        assert abs(found[label] - share * size) <= 1
    assert len(subset) >= math.floor(round(share * sum(sizes), 9))
    if all(share * size >= 1 for size in sizes):
        assert len(subset) == math.floor(round(share * sum(sizes), 9))


def test_one_and_ten_percent_have_the_size_of_the_published_lists() -> None:
    sizes = [1300] * 895 + [
        732 + place % 569 for place in range(105)
    ]  # of ImageNet's kind, and then its total
    sizes[-1] += 1_281_167 - sum(sizes)
    for share, published in ((0.01, 12_811), (0.1, 128_116)):
        quotas = _quotas(dict(enumerate(sizes)), share)
        assert sum(quotas.values()) == published
        assert quotas[0] == 1300 * share


def test_what_is_taken_depends_on_names_and_seed_alone() -> None:
    whole = named([30, 50])
    there = named([30, 50], "/mnt/other")
    backward = Named(names=whole.names[::-1], labels=list(reversed(whole.labels or ())))
    chosen = stratified(whole, 0.2, seed=3)
    assert (
        files(stratified(there, 0.2, seed=3))
        == files(stratified(backward, 0.2, seed=3))
        == files(chosen)
    )
    assert files(stratified(whole, 0.2, seed=4)) != files(chosen)
    assert files(chosen) < files(stratified(whole, 0.4, seed=3))
    assert (
        len(files(chosen) & {f"0_{place}.jpg" for place in range(6)}) < 6
    )  # not the first of the folder


def test_shares_that_are_none_and_images_without_labels_are_refused() -> None:
    for share in (0, -0.1, 1.1):
        with pytest.raises(ValueError, match=rf" {share}\b.* above 0 .* 1 or less"):
            stratified(named([3]), share, seed=0)
    with pytest.raises(DataError, match="named train .*no labels"):
        stratified(dataclasses.replace(named([3]), labels=None), 0.5, seed=0)


def test_a_list_names_images_by_their_files(tmp_path: Path) -> None:
    path = tmp_path / "1percent.txt"
    path.write_text("1_4.jpg\n\n0_2.jpg\n1/1_3.jpg\n0_2.jpg\n")
    subset = listed(named([3, 4]), path)
    assert list(subset.indices) == [2, 3, 4]
    assert subset.list_hash() == Subset(images=named([3, 4]), indices=[2, 3, 4]).list_hash()
    assert list(list_names(path)) == ["1_4.jpg", "0_2.jpg", "1_3.jpg"]


def test_lists_that_do_not_fit_are_told(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    with pytest.raises(DataError, match=r"list\.txt .*No such file or directory"):
        listed(named([3, 4]), path)
    path.write_text(" \n")
    with pytest.raises(DataError, match="list.txt names no images"):
        listed(named([3, 4]), path)
    path.write_text("1_4.jpg\n1_9.jpg\nx.jpg\n")
    with pytest.raises(
        DataError,
        match=r"2 of 3 names .*\bnamed train\b.*1_9\.jpg \(0",
    ):
        listed(named([3, 4]), path)
    path.write_text("1_4.jpg\n")
    twice = Named(names=["/a/1_4.jpg", "/b/1_4.jpg"], labels=[0, 1])
    with pytest.raises(DataError, match=r"such as 1_4.jpg \(2 images\)"):
        listed(twice, path)


@given(st.integers(0, 60), st.integers(1, 70))
def test_even_steps(n: int, most: int) -> None:
    indices = evenly_spaced(n, most)
    assert len(indices) == min(n, most)
    steps = {after - before for before, after in itertools.pairwise(indices)}
    assert not indices or indices[0] == 0
    assert indices[-1:] < [n]
    assert not steps or (min(steps) >= 1 and max(steps) - min(steps) <= 1)
