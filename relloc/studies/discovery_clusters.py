"""Clusters of discovery: constellations with the images in which they are verified.

Those with enough images have a set of them, and of the sets those are selected that cover more.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int, Int64
from torch import Tensor

from relloc.studies.best_images import BestImages
from relloc.studies.purity_coverage import ImagesOfSets, select_by_coverage

PatchBoxes = Int[np.ndarray, "4 4"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedSeeds:
    """Constellations: unit vectors of their m = 4 s patches on the device, images and boxes."""

    vectors: Float32[Tensor, "m d"]
    images: Int64[Tensor, "s"]
    boxes: Int64[Tensor, "s 4 4"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Cluster:
    """A constellation and the images in which it is verified, best match first.

    Attributes:
        number: its number among all constellations, in the order in which they were drawn.
        seed_image, seed_boxes: the index of the image that it was drawn in, and its four patches.
        images, scores, boxes: indices of images, sums of four correlations, and matched patches.
        n_searched: number of best images among which these were verified.
    """

    number: int
    seed_image: int
    seed_boxes: PatchBoxes
    images: Int[np.ndarray, "verified"]
    scores: Float64[np.ndarray, "verified"]
    boxes: Int[np.ndarray, "verified 4 4"]
    n_searched: int


def ranked_clusters(
    seeds: EncodedSeeds,
    best: BestImages,
    verified: Bool[Tensor, "s top"],
    set_size: int,
) -> list[Cluster]:
    """Returns constellations from the one with most verified images on.

    Of equally many, that with the higher mean score of its first `set_size` verified images comes
    first (our choice), and then the one that was drawn first.
    """
    scores = best.scores.double().cpu()
    images = best.images.cpu()
    boxes = best.boxes.cpu()
    clusters = []
    keys = []
    for number in range(len(images)):
        columns = verified[number].nonzero().squeeze(1)
        cluster = Cluster(
            number=number,
            seed_image=int(seeds.images[number]),
            seed_boxes=seeds.boxes[number].numpy(),
            images=images[number, columns].numpy(),
            scores=scores[number, columns].numpy(),
            boxes=boxes[number, columns].numpy(),
            n_searched=int((images[number] >= 0).sum()),
        )
        mean_score = -math.inf
        if len(columns):
            mean_score = float(cluster.scores[:set_size].mean())
        keys.append((-len(columns), -mean_score, number))
        clusters.append(cluster)
    order = sorted(range(len(clusters)), key=keys.__getitem__)
    return [clusters[number] for number in order]


def select_sets(
    clusters: Sequence[Cluster], indices: Sequence[int], *, set_size: int, most: int
) -> tuple[list[Cluster], ImagesOfSets]:
    """Returns the clusters whose sets are selected, and the positions in `indices` of each set.

    Args:
        clusters: the best one first.
        indices: the images that were searched.
        set_size: the number of images of a set, the best matches. Clusters with fewer have none.
        most: the largest number of sets.
    """
    position_of = {index: position for position, index in enumerate(indices)}
    with_set = [cluster for cluster in clusters if len(cluster.images) >= set_size]
    sets = []
    for cluster in with_set:
        positions = [position_of[int(index)] for index in cluster.images[:set_size]]
        sets.append(np.array(positions, dtype=np.int64))
    numbers = select_by_coverage(sets, len(indices), most)
    return [with_set[number] for number in numbers], [sets[number] for number in numbers]
