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

from relloc.data.cuts import Cut
from relloc.data.images import Jpeg, Undecoded
from relloc.data.loader import Reasons, Sample
from relloc.geometry import Pair

Bytes = UInt8[Tensor, "_n"]
FlatArray = UInt8[np.ndarray, "_n"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class UndecodedSample:
    """Image `index` before it is decoded, or None if it can't be used, and how to cut a square.

    `unreadable` gives the reasons by the names of the images that could not be read.
    """

    index: int
    image: Undecoded | None
    cut: Cut | None = None
    unreadable: Reasons = dataclasses.field(default_factory=dict)


@runtime_checkable
class UndecodedSamples(Protocol):
    """A data set whose samples can be decoded here (`[key]`) or elsewhere (`undecoded(key)`)."""

    def __getitem__(self, key: Any, /) -> Sample: ...

    def undecoded(self, key: Any, /) -> UndecodedSample: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentImage:
    """An image as it is sent: its bytes lie from `start` to before `end` of those of its batch.

    They are pixels of `pixels_size` (height, width). If that is None they are a JPEG, of
    `stored_size` and upright after `transposition` (see `Jpeg`). `key` is that of the sample.
    """

    key: Any
    index: int
    cut: Cut
    start: int
    end: int
    pixels_size: Pair | None
    stored_size: Pair | None
    transposition: Image.Transpose | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class UndecodedMessage:
    """What a worker process reports of a batch, beside its bytes.

    Pixels come first, `n_pixel_bytes` of them, so that one copy takes all of them to a device.
    """

    images: list[SentImage]
    unreadable: Reasons
    n_pixel_bytes: int


def write_undecoded(
    samples: UndecodedSamples,
    keys: Sequence[Any],
    memory: Callable[[tuple[int, ...]], Tensor],
) -> tuple[UndecodedMessage, Bytes]:
    """Reads the samples of `keys`, and writes the bytes of those that have any to `memory(shape)`.

    Returns the message about the batch, and the memory.
    """
    unreadable: Reasons = {}
    images: list[SentImage] = []
    contents: list[FlatArray] = []
    for key in keys:
        sample = samples.undecoded(key)
        # Also of a sample with an image, which may stand for others that could not be read
        unreadable.update(sample.unreadable)
        if sample.image is None or sample.cut is None:
            continue
        image, content = _sent(key, sample.index, sample.image, sample.cut)
        images.append(image)
        contents.append(content)

    # Pixels first, then JPEGs
    order = sorted(range(len(images)), key=lambda place: images[place].pixels_size is None)
    n_bytes = sum(map(len, contents))
    rows = memory((n_bytes,))
    array = rows.numpy()
    start = n_pixel_bytes = 0
    for place in order:
        end = start + len(contents[place])
        array[start:end] = contents[place]
        images[place] = dataclasses.replace(images[place], start=start, end=end)
        if images[place].pixels_size is not None:
            n_pixel_bytes = end
        start = end
    message = UndecodedMessage(images=images, unreadable=unreadable, n_pixel_bytes=n_pixel_bytes)
    return message, rows


def _sent(key: Any, index: int, image: Undecoded, cut: Cut) -> tuple[SentImage, FlatArray]:
    """Returns an image as it is sent, not placed yet, and its bytes."""
    if isinstance(image, Jpeg):
        content = np.frombuffer(image.content, dtype=np.uint8)
        sent = SentImage(
            key=key,
            index=index,
            cut=cut,
            start=0,
            end=0,
            pixels_size=None,
            stored_size=image.stored_size,
            transposition=image.transposition,
        )
        return sent, content
    # Of pixels only those are sent that the square depends on.
    first_step, *more_steps = cut.steps
    top, left, bottom, right = first_step.needed()
    pixels = image[top:bottom, left:right]
    first_step = dataclasses.replace(first_step, origin=(top, left))
    sent = SentImage(
        key=key,
        index=index,
        cut=dataclasses.replace(cut, steps=(first_step, *more_steps)),
        start=0,
        end=0,
        pixels_size=(bottom - top, right - left),
        stored_size=None,
        transposition=None,
    )
    return sent, pixels.reshape(-1)
