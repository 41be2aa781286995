"""Query patches of the study of nearest patches: drawn at random, or chosen by the user."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from relloc import checks
from relloc.data.image_set import ImageSet
from relloc.errors import UnreadableImage, UsageError
from relloc.seeds import Use, seed_for
from relloc.studies.patch_search import NONE
from relloc.studies.patch_vectors import CollectedPatches
from relloc.terminal import quantity


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Queries:
    """Patches whose neighbors are searched in a collection.

    Attributes:
        patches: the queries themselves.
        groups: the source of each, by the number that the collection's patches of it have; `NONE`
            where there are none.
        rows: the row of each in the collection; None for chosen queries, which are not in it.
    """

    patches: CollectedPatches
    groups: Int64[Tensor, "q"]
    rows: Int64[Tensor, "q"] | None


def random_queries(
    collection: CollectedPatches, groups: Int64[Tensor, "n"], n: int, seed: int
) -> Queries:
    """Returns `n` patches of the collection as queries, each of another source (`draw_queries`)."""
    rows = draw_queries(groups, n, seed)
    vectors = {}
    for layer, of_layer in collection.vectors.items():
        vectors[layer] = of_layer[rows.to(of_layer.device)]
    patches = CollectedPatches(
        vectors=vectors, images=collection.images[rows], boxes=collection.boxes[rows]
    )
    return Queries(patches=patches, groups=groups[rows], rows=rows)


def draw_queries(groups: Int64[Tensor, "n"], n: int, seed: int) -> Int64[Tensor, "q"]:
    """Returns the numbers of `n` random patches, each of another source, or one of each source.

    They depend on which images have patches and on the seed, but not on any network. `groups` are
    the sources of the patches, numbered from 0 without gaps.
    """
    generator = torch.Generator().manual_seed(seed_for(Use.STUDY_QUERIES, seed))
    counts = groups.bincount()
    order = groups.argsort(stable=True)
    first_of_group = counts.cumsum(dim=0) - counts
    chosen_groups = torch.randperm(len(counts), generator=generator)[:n]
    # A uniform number of each of its patches
    u = torch.rand(len(counts), generator=generator, dtype=torch.float64)[:n]
    numbers = (u * counts[chosen_groups]).long()
    return order[first_of_group[chosen_groups] + numbers]


def chosen_queries(
    patches: CollectedPatches,
    images: ImageSet,
    collection: CollectedPatches,
    groups: Int64[Tensor, "n"],
) -> Queries:
    """Returns patches that are not in the collection as queries."""
    group_of_source = {}
    for index, group in zip(collection.images.tolist(), groups.tolist(), strict=True):
        group_of_source[images.source(index)] = group
    own_groups = []
    for index in patches.images.tolist():
        own_groups.append(group_of_source.get(images.source(index), NONE))
    own = torch.tensor(own_groups, dtype=torch.int64)
    return Queries(patches=patches, groups=own, rows=None)


def check_chosen(setting: str, chosen: object) -> None:
    """Checks that chosen queries, the setting `setting`, are images and boxes.

    Raises:
        UsageError: they are no list, or one of them is something else.
    """
    if not isinstance(chosen, list | tuple):
        raise UsageError(
            f"{setting} is {chosen}: give a list of queries, such as "
            "[{image: a.jpg, box: [0, 0, 96, 96]}]"
        )
    for number, query in enumerate(chosen):
        of_query = f"{setting}[{number}]"
        if not isinstance(query, Mapping) or set(query) != {"image", "box"}:
            raise UsageError(
                f"{of_query} is {query}: give image and box, such as "
                "{image: a.jpg, box: [0, 0, 96, 96]}"
            )
        if not isinstance(query["image"], str):
            checks.whole(f"{of_query}.image", query["image"], at_least=0)
        box = checks.wholes(f"{of_query}.box", query["box"], at_least=0)
        is_box = len(box) == 4 and box[0] < box[2] and box[1] < box[3]
        if not is_box:
            raise UsageError(
                f"{of_query}.box is {box}: give x1, y1, x2, y2 with x1 below x2 and y1 below y2"
            )


def images_of_chosen(
    setting: str, chosen: Sequence[Mapping[str, Any]], images: ImageSet
) -> list[int]:
    """Returns the index of the image of each chosen query, once its box is known to fit.

    Raises:
        UsageError: an image is not there or can't be read, or a box does not lie within its image.
    """
    indices = []
    for number, query in enumerate(chosen):
        of_query = f"{setting}[{number}]"
        index = find_image(images, query["image"], f"{of_query}.image")
        try:
            image = images.read(index)
        except UnreadableImage as error:
            raise UsageError(
                f"{of_query}.image is {query['image']}, which can't be read ({error}): give "
                "another image"
            ) from error
        _, _, x2, y2 = query["box"]
        if x2 > image.width or y2 > image.height:
            raise UsageError(
                f"{of_query}.box is {query['box']}, but the image has {image.width} x "
                f"{image.height} px: give a box within it"
            )
        indices.append(index)
    return indices


def find_image(images: ImageSet, name: str | int, setting: str) -> int:
    """Returns the index of the image with this number, or with a path that ends in this name.

    Raises:
        UsageError: there is none, or there are several.
    """
    where = f"{images.name} {images.split}"
    if isinstance(name, int):
        if name >= len(images):
            raise UsageError(
                f"{setting} is {name}, but {where} has images 0 to {len(images) - 1}: give one of "
                "them, or a file name"
            )
        return name
    indices = []
    for index in range(len(images)):
        # The end of a path counts from the name of a folder on.
        if f"/{images.source(index)}".endswith(f"/{name}"):
            indices.append(index)
    if len(indices) != 1:
        raise UsageError(
            f"{setting} is {name}, which names {quantity(len(indices), 'image')} of {where}: give "
            f"the end of a path that one image has, or its number from 0 to {len(images) - 1}"
        )
    return indices[0]
