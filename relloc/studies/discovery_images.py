"""Which images discovery searches, where they come from and which classes they show."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from relloc import checks
from relloc.data.image_set import ImageSet
from relloc.data.subsets import evenly_spaced
from relloc.errors import DataError, UsageError
from relloc.studies.patch_search import source_groups
from relloc.studies.purity_coverage import ImagesOfSets, Shows
from relloc.studies.shown_classes import shown_classes


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchedImages:
    """The images that are searched, by index, and which classes each shows, if that is known."""

    indices: Sequence[int]
    shows: Shows | None
    class_names: Sequence[str]


def searched_images(
    images: ImageSet, classes: Sequence[str] | None, n_images: int | None, *, setting: str
) -> SearchedImages:
    """Returns the images that show one of `classes`, at most `n_images`, and what they show.

    Args:
        images: the split.
        classes: names of classes; None for all images, and for all classes.
        n_images: how many are taken, evenly spaced; None for all.
        setting: the setting of the study, for messages.

    Raises:
        UsageError: a class is not one of the data set, or images have no labels to choose by.
        DataError: a list of classes is missing or damaged, or there are fewer than two images.
    """
    shows = shown_classes(images)
    class_names: Sequence[str] = images.classes
    indices = list(range(len(images)))
    if classes is not None:
        if shows is None:
            raise UsageError(
                f"{setting}.classes is {list(classes)}, but {images.name} {images.split} "
                "has no labels to choose images by: leave it out"
            )
        columns = []
        for name in classes:
            checks.one_of(f"{setting}.classes", name, images.classes)
            columns.append(images.classes.index(name))
        class_names = tuple(classes)
        shows = shows[:, columns]
        indices = np.flatnonzero(shows.any(axis=1)).tolist()
    if len(indices) < 2:
        raise DataError(
            f"{setting} compares images with one another, but {images.name} {images.split} "
            f"has only {len(indices)} to search: give more images, or other classes"
        )
    if n_images is not None:
        indices = [indices[step] for step in evenly_spaced(len(indices), n_images)]
    if shows is not None:
        shows = shows[indices]
    return SearchedImages(indices=indices, shows=shows, class_names=class_names)


def source_numbers(images: ImageSet, indices: Sequence[int]) -> Int64[Tensor, "n"]:
    """Returns the number of the source of each image by index, and -1 for those not searched.

    Raises:
        DataError: all images that are searched are of one source.
    """
    sources = torch.full((len(images),), -1)
    searched = torch.tensor(indices)
    sources[searched] = source_groups(images, searched)
    if int(sources.max()) < 1:
        raise DataError(
            f"all images of {images.name} {images.split} that are searched are of one source, "
            f"{images.source(indices[0])}, and constellations are searched in others than their "
            "own: give more images"
        )
    return sources


def main_classes(sets: ImagesOfSets, searched: SearchedImages) -> list[str]:
    """Returns for each set the name of its most frequent class and its purity, or nothing."""
    if searched.shows is None:
        return [""] * len(sets)
    names = []
    for positions in sets:
        shares = searched.shows[positions].mean(axis=0)
        main = int(shares.argmax())
        names.append(f"{searched.class_names[main]} {100 * shares[main]:.0f} %")
    return names
