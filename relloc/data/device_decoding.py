"""Decodes batches of JPEGs on the device that computes, and cuts their squares there.

Worker processes send the bytes of files (`relloc.data.undecoded`), so that a few cores keep a fast
GPU busy. There torchvision decodes by nvJPEG, which rounds otherwise than libjpeg; on a CPU it is
libjpeg itself. The squares are those that Pillow would cut (`relloc.data.resampling`).
"""

import contextlib
import functools
import queue
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from relloc.data.handing_over import answer_with, memory_to_hand_over, own_memory, received
from relloc.data.loader import ImageBatch
from relloc.data.readers import Answer, ReadingProcesses, look_ahead, never
from relloc.data.resampling import ImageTensor, squares
from relloc.data.undecoded import (
    Bytes,
    SentImage,
    UndecodedMessage,
    UndecodedSamples,
    write_undecoded,
)

# Axes of a tensor (color, row, column) to mirror, after rows and columns were swapped or not
_TURNED: dict[Image.Transpose, tuple[bool, tuple[int, ...]]] = {
    Image.Transpose.FLIP_LEFT_RIGHT: (False, (2,)),
    Image.Transpose.FLIP_TOP_BOTTOM: (False, (1,)),
    Image.Transpose.ROTATE_180: (False, (1, 2)),
    Image.Transpose.TRANSPOSE: (True, ()),
    Image.Transpose.ROTATE_90: (True, (1,)),
    Image.Transpose.ROTATE_270: (True, (2,)),
    Image.Transpose.TRANSVERSE: (True, (1, 2)),
}

_BATCHES_AT_ONCE = 2  # that are made beside what is computed of earlier ones


def load_to_device(
    samples: UndecodedSamples,
    batches: Iterable[list[Any]],
    *,
    workers: int,
    device: torch.device,
    print_message: Callable[[str], None] = lambda _text: None,
    stopping: Callable[[], bool] = never,
) -> Iterator[ImageBatch]:
    """Yields one batch on `device` for each list of sample keys, in their order.

    The batches are those of `relloc.data.loader.load`, but for the rounding of the device's
    decoder. Beside what the caller computes, two threads make the next ones, each on a stream of
    its own on a GPU, so that one prepares its batch while the other's is decoded. At most four
    batches are in the memory of the device. With 0 `workers` this process reads and decodes them
    one after another. `print_message` and `stopping` are those of `ReadingProcesses`.

    Raises:
        Interrupted: a worker was killed.
        NoImagesCame: the run was asked to stop, and no images came.
    """
    decode = BatchDecoder(samples, device)
    with contextlib.ExitStack() as until_read:
        if workers:
            read = functools.partial(_read_and_hand_over, samples)
            reading = ReadingProcesses(
                read, batches, workers=workers, stopping=stopping, print_message=print_message
            )
            answers = until_read.enter_context(reading)
            loaded = look_ahead(
                answers, lambda answer: decode(*received(answer)), at_once=_BATCHES_AT_ONCE
            )
        else:
            loaded = (decode(*write_undecoded(samples, keys, own_memory)) for keys in batches)
        until_read.enter_context(contextlib.closing(loaded))
        for batch in loaded:
            if batch.pixels.is_cuda:
                # The memory belongs to a stream of the decoder, which must not use it again before
                # the caller's stream has read it.
                batch.pixels.record_stream(torch.cuda.current_stream(device))
            yield batch


def _read_and_hand_over(samples: UndecodedSamples, keys: list[Any]) -> Answer:
    """Reads a batch in a worker process, into memory that is handed to the training process."""
    descriptors: list[int] = []
    memory = functools.partial(memory_to_hand_over, descriptors)
    message, content = write_undecoded(samples, keys, memory)
    return answer_with(message, content, descriptors)


class BatchDecoder:
    """Makes the squares of a batch of images that were sent undecoded, on a device.

    An image that the device can't decode is decoded on the CPU from its own file, as if there was
    no device: it may be readable there, or be reported as unreadable, or be replaced.
    """

    def __init__(self, samples: UndecodedSamples, device: torch.device) -> None:
        self._samples = samples
        self._device = device
        # Beside the stream of what is computed of earlier batches; each thread takes one.
        self._streams: queue.SimpleQueue[Any] = queue.SimpleQueue()
        if device.type == "cuda":
            for _ in range(_BATCHES_AT_ONCE):
                self._streams.put(torch.cuda.Stream(device))

    def __call__(self, message: UndecodedMessage, content: Bytes) -> ImageBatch:
        if self._device.type != "cuda":
            return self._batch(message, content)
        stream = self._streams.get()
        try:
            with torch.cuda.stream(stream):
                batch = self._batch(message, content)
            # Then all streams may read the batch, and the next one may be decoded: nvJPEG, on a
            # stream of its own, writes to memory that this one has freed, whether or not it still
            # reads there.
            stream.synchronize()
        finally:
            self._streams.put(stream)
        return batch

    def _batch(self, message: UndecodedMessage, content: Bytes) -> ImageBatch:
        images = self._images(message, content)
        decoded = [image for image in images if image is not None]
        cuts = []
        for sent, image in zip(message.images, images, strict=True):
            if image is not None:
                cuts.append(sent.cut)
        rows = list(squares(decoded, cuts)) if decoded else []

        # What the device could not decode is decoded here, and takes its place in the order.
        unreadable = dict(message.unreadable)
        remaining = iter(rows)
        rows_in_order = []
        indices = []
        for sent, image in zip(message.images, images, strict=True):
            if image is not None:
                rows_in_order.append(next(remaining))
                indices.append(sent.index)
                continue
            sample = self._samples[sent.key]
            unreadable.update(sample.unreadable)
            if sample.pixels is not None:
                pixels = torch.from_numpy(sample.pixels.copy()).permute(2, 0, 1)
                rows_in_order.append(pixels.to(self._device))
                indices.append(sample.index)
        return ImageBatch(
            pixels=_stacked(rows_in_order, self._device),
            indices=torch.tensor(indices, dtype=torch.int64),
            unreadable=unreadable,
        )

    def _images(self, message: UndecodedMessage, content: Bytes) -> list[ImageTensor | None]:
        """Returns all images upright on the device; None for those that it can't decode."""
        sent_jpegs = [sent for sent in message.images if sent.pixels_size is None]
        jpegs = [content[sent.start : sent.end] for sent in sent_jpegs]
        decoded = iter(self._decoded(jpegs))
        pixels = content[: message.n_pixel_bytes]
        if self._device.type == "cuda" and len(pixels):
            # From page-locked memory the copy runs beside other work.
            pixels = pixels.pin_memory()
        pixels = pixels.to(self._device, non_blocking=True)

        images: list[ImageTensor | None] = []
        for sent in message.images:
            if sent.pixels_size is not None:
                rows = pixels[sent.start : sent.end].view(*sent.pixels_size, 3)
                images.append(rows.permute(2, 0, 1))
                continue
            image = next(decoded)
            # A decoder that understands a file otherwise than its header was read has failed.
            if image is None or image.shape[1:] != sent.stored_size:
                images.append(None)
            else:
                images.append(_upright(image, sent))
        return images

    def _decoded(self, jpegs: list[Bytes]) -> list[ImageTensor | None]:
        """Returns images as they are stored; None for those that can't be decoded."""
        if not jpegs:
            return []
        try:
            return decode_jpeg(jpegs, mode=ImageReadMode.RGB, device=self._device)  # pyright: ignore[reportReturnType] - a list for a list
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            if len(jpegs) == 1:
                return [None]
        # One of them fails the whole batch.
        images = []
        for jpeg in jpegs:
            images += self._decoded([jpeg])
        return images


def _upright(image: ImageTensor, sent: SentImage) -> ImageTensor:
    """Returns an image turned upright, as Pillow's `transpose` does."""
    if sent.transposition is None:
        return image
    swaps_axes, mirrored_axes = _TURNED[sent.transposition]
    turned = image.mT if swaps_axes else image
    return turned.flip(mirrored_axes)


def _stacked(rows: list[ImageTensor], device: torch.device) -> UInt8[Tensor, "b 3 s s"]:
    """Returns squares as a batch, in memory with channels last."""
    if not rows:
        return torch.empty(0, 3, 0, 0, dtype=torch.uint8, device=device)
    return torch.stack(rows).contiguous(memory_format=torch.channels_last)
