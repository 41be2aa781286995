"""Which classes images show, however they are labeled."""

import numpy as np
from jaxtyping import Bool

from relloc.data.image_set import ImageSet
from relloc.data.lists import THERE, MultiLabeled


def shown_classes(images: ImageSet) -> Bool[np.ndarray, "images classes"] | None:
    """Returns for each image and class whether the image shows it; None without labels.

    A class that is only there as a difficult object (PASCAL VOC) does not count.
    """
    if isinstance(images, MultiLabeled):
        return np.array(images.presence()) == THERE
    if images.labels is None:
        return None
    labels = np.asarray(images.labels)
    return labels[:, None] == np.arange(len(images.classes))
