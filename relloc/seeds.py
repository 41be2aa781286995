"""Seeds of everything random: one for each use, so that no two uses share random numbers.

The initial weights of networks are the exception: they come from `torch.manual_seed(seed)` itself,
as is common.
"""

import enum
import hashlib
from collections.abc import Iterable
from typing import Any

# Goes up when a use within pretraining gets other random numbers: a run that began with the numbers
# of an earlier version can't be resumed.
PRETRAINING_VERSION = 2


@enum.unique
class Use(enum.Enum):
    """What random numbers are used for, and the numbers that `seed_for` takes for it.

    The text of a value is hashed into the seed: changing a word changes the random numbers.
    """

    IMAGE_ORDER = "order of the images of a pretraining epoch: seed, epoch"
    CROP = "size and place of a training image's crop: seed, epoch, image"
    PATCHES = "jitter, colors and dropout of a ghost batch: seed, step, place in the step"
    HELD_OUT_CROP = "size of a held-out image's crop: seed, image"
    HELD_OUT_PATCHES = "jitter and colors of held-out images: seed"
    PICTURE_CROP = "crop of an image in the picture of patches: seed, image"
    PICTURE_PATCHES = "jitter and colors in the picture of patches: seed"

    CALIBRATION_IMAGES = "images on which batch norm is recalibrated: seed"
    CALIBRATION_VIEW = "view of such an image: seed, image"
    HELD_BACK = "training images held back to choose among linear heads: seed"
    HEAD_WEIGHTS = "initial weights of linear heads: seed"
    HEAD_BATCHES = "order of the images of an epoch of linear heads: seed, epoch"
    AUGMENTED_VIEW = "box and flip of a training view of linear heads: seed, epoch, image"
    AUGMENTED_COLOR = "color jitter and lighting of such a view: seed, epoch, image"
    FINE_TUNING_WEIGHTS = "initial weights of the layer that fine-tuning adds: seed"
    FINE_TUNING_ORDER = "order of the images of an epoch of fine-tuning: seed, epoch"
    FINE_TUNING_VIEW = "box and flip of a view in fine-tuning: seed, epoch, image"
    FINE_TUNING_SAMPLE = (
        "all that is random of a sample of a detector or segmenter: seed, its number"
    )
    FINE_TUNING_FORWARD = (
        "dropout and other chance inside a forward of fine-tuning: "
        "seed, step, its place in the step"
    )
    FINE_TUNING_DROPOUT = "dropout of a sample of a segmenter or classifier: seed of the sample"
    TEST_CROPS = "crops of an image that a fine-tuned classifier is tested on: seed, image"
    RESCALING_VIEW = "view of an image on which a network is rescaled: seed, image"
    RESCALING_GRADIENT = "gradient at the outputs when layers are rescaled: seed"
    ANCHOR_SAMPLE = "anchors that a detector is trained on: seed of the image in its step"
    REGION_SAMPLE = (
        "regions that a detector's box head is trained on: seed of the image in its step"
    )
    REGION_DROPOUT = "dropout of a region of a detector: seed of the image in its step, the region"
    DETECTOR_WEIGHTS = "initial weights of the layers that a detector adds: seed"
    LOW_SHOT_IMAGES = "images of a low-shot draw: seed, class, k, number of the draw"
    SHORTCUT_PATCHES = (
        "single patches and crops of an image in the study of shortcuts: seed, split, image"
    )
    SHORTCUT_COLORS = "colors of such patches: seed, split, image"
    SHORTCUT_QUESTIONS = "jitter and colors of a photograph in the study of shortcuts: seed, image"
    SHORTCUT_NOISE = "noise images of the study of shortcuts: seed, block of images"
    SHORTCUT_NOISE_VIEWS = "noise as large as a view in that study: seed, split, block of images"
    SHORTCUT_NOISE_QUESTIONS = "jitter and colors of such an image: seed, image"
    SHORTCUT_NETWORK = "weights, order and colors of the network that finds positions: seed, epoch"
    LIDAR_PATCHES = "places of the patches of an image that LiDAR compares: seed, image"
    DENSE_GROUPS = "which images DSE puts into a group: seed"
    DENSE_GROUP_CLUSTERS = "first centroids of the clusters of a group of images: seed, group"
    BOOTSTRAP = "settings that a bootstrap of correlations draws again: no number"
    DENSE_IMAGE_CLUSTERS = "first centroids of the clusters of an image: seed, image"
    ASKED_PLACES = "sizes and places of grids that a study asks about: seed, image"
    ASKED_PATCHES = "jitter and colors of these grids: seed, image"
    DISCOVERY_IMAGES = "which images get one more constellation than others: seed"
    DISCOVERY_SEEDS = "constellations of patches that are searched for, in an image: seed, image"
    DISCOVERY_LABELS = "labels of images shuffled, for purity by chance: seed, number of shuffle"
    PERSON_IMAGES = "order of the images that a person is asked about: seed, round"
    PERSON_PLACE = "place of a question to a person: seed, number of the question"
    PERSON_LABEL = "right answer of a question to a person: seed, number of the question"
    PERSON_PATCHES = "jitter and colors of such a question: seed, number of the question"
    PERSON_NETWORK = "colors of such a question to a network: seed, number of the question"
    STUDY_PATCHES = "boxes of the patches that a study cuts from an image: seed, image"
    STUDY_QUERIES = "patches whose nearest neighbors are looked for: seed"


def seed_for(use: Use, *numbers: int) -> int:
    """Returns a seed of 63 bits: the same for the same use and numbers, in any process.

    Seeds of other uses or other numbers are unrelated to it. A call takes about a microsecond.

    Example:
        >>> generator = torch.Generator().manual_seed(seed_for(Use.HELD_OUT_PATCHES, seed))
    """
    words = [use.value, *map(str, numbers)]
    # A hash, since the seeds of neighboring numbers are to be unrelated.
    return _seed(hashlib.sha256(" ".join(words).encode()))


def seeds_for(use: Use, *numbers: int, last: Iterable[int]) -> list[int]:
    """Returns `seed_for(use, *numbers, n)` for each n of `last`, in a third of the time."""
    words = [use.value, *map(str, numbers)]
    # What the texts have in common is hashed once.
    common = hashlib.sha256((" ".join(words) + " ").encode())
    seeds = []
    for number in last:
        whole = common.copy()
        whole.update(str(number).encode())
        seeds.append(_seed(whole))
    return seeds


def _seed(hashed: Any) -> int:
    first_64_bits = int.from_bytes(hashed.digest()[:8], "big")
    # One bit less, since generators take seeds as signed 64-bit numbers.
    return first_64_bits >> 1
