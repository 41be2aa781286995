"""Collects what was measured of each image, from all processes of a run."""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from relloc import ranks

T = TypeVar("T")
Result = TypeVar("Result")


class PerImage(Generic[T]):
    """A value for each image of a split that the processes of a run have divided.

    Each image counts once, even if several processes evaluated it, as samplers that pad the last
    batch let them do. So the result is the same in any number of processes.

    Example:
        images = PerImage()
        for index in own_indices:
            images.add(index, voc_image(network.detect(...), truth.objects(index)))
        ap50 = images.evaluate(lambda images: average_precision(images, ...))
    """

    def __init__(self) -> None:
        self._values: dict[int, T] = {}

    def add(self, image: int, value: T) -> None:
        """Keeps the value of an image, on the CPU. `image` numbers the images of the split."""
        self._values[image] = value

    def evaluate(self, compute: Callable[[Sequence[T]], Result]) -> Result:
        """Returns the result of `compute` for the values of all processes, in the order of images.

        All processes call it together. Rank 0 computes, the others wait and get what it returned.
        """
        value_of_image: dict[int, T] = {}
        values_of_ranks = ranks.gathered_on_first(self._values)
        for values in values_of_ranks:
            value_of_image.update(values)
        # On the other ranks nothing is there to compute from, and rank 0's result replaces None.
        result = None
        if ranks.rank() == 0:
            # In the order of images, as metrics decide ties by it.
            indices = sorted(value_of_image)
            in_order = [value_of_image[index] for index in indices]
            result = compute(in_order)
        # All ranks go on with one result, so that they take the same decisions by it.
        return ranks.from_first(result)  # pyright: ignore[reportReturnType]
