"""What a worker process sends of images that are decoded elsewhere: bytes, and how to cut them.

It reads the files, draws the squares by the sizes of the images alone, and decodes only what a
device may not decode as Pillow does. `relloc.data.device_decoding` decodes the rest.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from relloc.data.cuts import BatchCuts, Cut, batch_cuts
from relloc.data.images import Jpeg, Undecoded
from relloc.data.loader import DrawnNumbers, Reasons, Sample, as_array
from relloc.geometry import Pair

Bytes = UInt8[Tensor, "_n"]
FlatArray = UInt8[np.ndarray, "_n"]
PixelArray = UInt8[np.ndarray, "_h _w 3"]


# Lists of `UndecodedMessage`, in the order in which they are written
_COLUMNS = ("keys", "indices", "n_bytes", "pixels_sizes", "stored_sizes", "transpositions")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UndecodedSample:
    """Image `index` before it is decoded, or None if it can't be used, and how to cut a square.

    `unreadable` gives the reasons by the names of the images that could not be read. `drawn` are
    random numbers that belong to the sample, if it has any.
    """

    index: int
    image: Undecoded | None
    cut: Cut | None = None
    unreadable: Reasons = dataclasses.field(default_factory=dict)
    drawn: Sequence[float] | None = None


@runtime_checkable
class UndecodedSamples(Protocol):
    """A data set whose samples can be decoded here (`[key]`) or elsewhere (`undecoded(key)`)."""

    def __getitem__(self, key: Any, /) -> Sample: ...

    def undecoded(self, key: Any, /) -> UndecodedSample: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class UndecodedMessage:
    """What a worker process reports of a batch, beside its bytes.

    Bytes of pixels come first, so that one copy takes all of them to a device, and then those of
    JPEGs. All lists have an entry for each image, in the order of the batch. The training process
    reads lists and arrays many times faster than an object for each image.

    Attributes:
        keys: the keys of the samples.
        indices: the numbers of the images.
        n_bytes: how many bytes were sent.
        pixels_sizes: height and width of pixels; None for a JPEG.
        stored_sizes: height and width of a JPEG as it is stored; None for pixels.
        transpositions: what turns the stored JPEG upright (see `Jpeg`), if anything has to.
        cuts: how the squares are cut.
        unreadable: why images can't be used, by their names.
        drawn: random numbers of the samples, if they have any.
    """

    keys: list[Any]
    indices: list[int]
    n_bytes: list[int]
    pixels_sizes: list[Pair | None]
    stored_sizes: list[Pair | None]
    transpositions: list[Image.Transpose | None]
    cuts: BatchCuts
    unreadable: Reasons
    drawn: DrawnNumbers


def write_undecoded(
    samples: UndecodedSamples,
    keys: Sequence[Any],
    memory: Callable[[tuple[int, ...]], Tensor],
) -> tuple[UndecodedMessage, Bytes]:
    """Reads the samples of `keys`, and writes the bytes of those that have any to `memory(shape)`.

    Returns the message about the batch, and the memory.
    """
    unreadable: Reasons = {}
    columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    cuts: list[Cut] = []
    drawn: list[Sequence[float] | None] = []
    pixels: list[FlatArray] = []
    jpegs: list[FlatArray] = []
    for key in keys:
        sample = samples.undecoded(key)
        # Also of a sample with an image, which may stand for others that could not be read
        unreadable.update(sample.unreadable)
        image = sample.image
        if image is None or sample.cut is None:
            continue
        cut = sample.cut
        pixels_size = stored_size = transposition = None
        if isinstance(image, Jpeg):
            content = np.frombuffer(image.content, dtype=np.uint8)
            jpegs.append(content)
            stored_size = image.stored_size
            transposition = image.transposition
        else:
            part, cut = _needed_part(image, cut)
            pixels_size = part.shape[:2]
            content = part.reshape(-1)
            pixels.append(content)
        row = (key, sample.index, len(content), pixels_size, stored_size, transposition)
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
        cuts.append(cut)
        drawn.append(sample.drawn)

    contents = [*pixels, *jpegs]
    rows = memory((sum(map(len, contents)),))
    if contents:
        np.concatenate(contents, out=rows.numpy())
    message = UndecodedMessage(
        **columns, cuts=batch_cuts(cuts), unreadable=unreadable, drawn=as_array(drawn)
    )
    return message, rows


def _needed_part(image: PixelArray, cut: Cut) -> tuple[PixelArray, Cut]:
    """Returns the pixels of an image that its square depends on, and the cut of these."""
    first_step, *more_steps = cut.steps
    top, left, bottom, right = first_step.needed()
    first_step = dataclasses.replace(first_step, origin=(top, left))
    cut = dataclasses.replace(cut, steps=(first_step, *more_steps))
    return image[top:bottom, left:right], cut
