"""Decodes batches of JPEGs on the device that computes, and cuts their squares there.

Worker processes send the bytes of files (`relloc.data.undecoded`), so that a few cores keep a fast
GPU busy. There torchvision decodes by nvJPEG, which rounds otherwise than libjpeg; on a CPU it is
libjpeg itself. The squares are those that Pillow would cut (`relloc.data.resampling`).
"""

import contextlib
import functools
import io
import queue
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from relloc.data.cuts import Cut, batch_cuts, whole
from relloc.data.handing_over import answer_with, memory_to_hand_over, own_memory, received
from relloc.data.loader import ImageBatch, Sample, as_tensor
from relloc.data.readers import Answer, ReadingProcesses, look_ahead, never
from relloc.data.resampling import ImageTensor, squares
from relloc.data.undecoded import (
    Bytes,
    UndecodedMessage,
    UndecodedSamples,
    write_undecoded,
)
from relloc.errors import UsageError, reason

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
# Rows of results name the device's decoder, which then has to have decoded nearly all images. The
# share is of those so far, and says little while only a few have failed.
_MOST_FAILED = 0.1
_FEW_FAILED = 100


def _note_nothing(_indices: Sequence[int]) -> None:
    pass


def load_to_device(
    samples: UndecodedSamples,
    batches: Iterable[list[Any]],
    *,
    workers: int,
    device: torch.device,
    print_message: Callable[[str], None] = lambda _text: None,
    stopping: Callable[[], bool] = never,
    note_failed: Callable[[Sequence[int]], None] = _note_nothing,
) -> Iterator[ImageBatch]:
    """Yields one batch on `device` for each list of sample keys, in their order.

    The batches are those of `relloc.data.loader.load`, but for the rounding of the device's
    decoder. Beside what the caller computes, two threads make the next ones, each on a stream of
    its own on a GPU, so that one prepares its batch while the other's is decoded. At most four
    batches are in the memory of the device. With 0 `workers` this process reads and decodes them
    one after another. `print_message` and `stopping` are those of `ReadingProcesses`, and
    `note_failed` that of `BatchDecoder`.

    Raises:
        Interrupted: a worker was killed.
        NoImagesCame: the run was asked to stop, and no images came.
        UsageError: the device can't decode JPEGs, or not enough of these.
    """
    decode = BatchDecoder(samples, device, note_failed)
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
    `note_failed` is called with the indices of images of a batch that only the CPU could decode.

    Raises (from calls, too):
        UsageError: the device can't decode JPEGs, or not enough of these.
    """

    def __init__(
        self,
        samples: UndecodedSamples,
        device: torch.device,
        note_failed: Callable[[Sequence[int]], None] = _note_nothing,
    ) -> None:
        self._samples = samples
        self._device = device
        self._note_failed = note_failed
        # How many JPEGs were sent, and how many of them only the CPU could decode
        self._n_jpegs = 0
        self._n_failed = 0
        self._counting = threading.Lock()
        with self._own_stream():
            decoded = self._check_device()
            self._check_resampling(decoded)

    def __call__(self, message: UndecodedMessage, content: Bytes) -> ImageBatch:
        with self._own_stream():
            return self._batch(message, content)

    @contextlib.contextmanager
    def _own_stream(self) -> Iterator[None]:
        """Runs the block on a stream beside that of what is computed of earlier batches."""
        if self._device.type != "cuda":
            yield
            return
        streams = _streams_of(self._device)
        stream = streams.get()
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            # Then all streams may read the batch, and the next one may be decoded: nvJPEG, on a
            # stream of its own, writes to memory that this one has freed, whether or not it still
            # reads there.
            try:
                stream.synchronize()
            finally:
                streams.put(stream)

    def _batch(self, message: UndecodedMessage, content: Bytes) -> ImageBatch:
        images = self._images(message, content)
        decoded: dict[int, ImageTensor] = {}
        on_cpu: dict[int, Sample] = {}
        for place, image in enumerate(images):
            if image is None:
                on_cpu[place] = self._samples[message.keys[place]]
            else:
                decoded[place] = image
        self._count(message, on_cpu)

        unreadable = dict(message.unreadable)
        if decoded and not on_cpu:
            pixels = squares(list(decoded.values()), message.cuts)
            indices = message.indices
            drawn = message.drawn
        else:
            # What was decoded on the CPU takes its place in the order.
            remaining: Iterator[Tensor] = iter(())
            if decoded:
                cuts = message.cuts.at(list(decoded))
                remaining = iter(squares(list(decoded.values()), cuts))
            rows = []
            indices = []
            kept = []
            for place, index in enumerate(message.indices):
                sample = on_cpu.get(place)
                if sample is None:
                    rows.append(next(remaining))
                    indices.append(index)
                    kept.append(place)
                    continue
                unreadable.update(sample.unreadable)
                if sample.pixels is not None:
                    kept.append(place)
                    row = torch.from_numpy(sample.pixels.copy()).permute(2, 0, 1)
                    rows.append(row.to(self._device))
                    indices.append(sample.index)
            pixels = _stacked(rows, self._device)
            drawn = None if message.drawn is None else message.drawn[kept]
        return ImageBatch(
            # This copies only what was stacked here.
            pixels=pixels.contiguous(memory_format=torch.channels_last),
            indices=torch.tensor(indices, dtype=torch.int64),
            unreadable=unreadable,
            drawn=as_tensor(drawn),
        )

    def _images(self, message: UndecodedMessage, content: Bytes) -> list[ImageTensor | None]:
        """Returns all images upright on the device; None for those that it can't decode."""
        n_bytes_of_pixels = []
        n_bytes_of_jpegs = []
        for n_bytes, pixels_size in zip(message.n_bytes, message.pixels_sizes, strict=True):
            of_kind = n_bytes_of_jpegs if pixels_size is None else n_bytes_of_pixels
            of_kind.append(n_bytes)
        all_pixels, all_jpegs = content.split([sum(n_bytes_of_pixels), sum(n_bytes_of_jpegs)])
        if self._device.type == "cuda" and n_bytes_of_pixels:
            # From page-locked memory the copy runs beside other work.
            all_pixels = all_pixels.pin_memory()
        all_pixels = all_pixels.to(self._device, non_blocking=True)
        pixels = iter(all_pixels.split(n_bytes_of_pixels))
        decoded = iter(self._decoded(list(all_jpegs.split(n_bytes_of_jpegs))))

        images: list[ImageTensor | None] = []
        for pixels_size, stored_size, transposition in zip(
            message.pixels_sizes, message.stored_sizes, message.transpositions, strict=True
        ):
            if pixels_size is not None:
                rows = next(pixels).view(*pixels_size, 3)
                images.append(rows.permute(2, 0, 1))
                continue
            image = next(decoded)
            # A decoder that understands a file otherwise than its header was read has failed.
            if image is None or image.shape[1:] != stored_size:
                images.append(None)
            else:
                images.append(_upright(image, transposition))
        return images

    def _decoded(self, jpegs: list[Bytes]) -> Sequence[ImageTensor | None]:
        """Returns images as they are stored; None for those that can't be decoded."""
        if not jpegs:
            return []
        try:
            return self._decoded_at_once(jpegs)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except RuntimeError:
            # It may also be the device that fails, and would do so for each of them.
            self._check_device()
            if len(jpegs) == 1:
                return [None]
        # One of them fails the whole batch.
        images: list[ImageTensor | None] = []
        for jpeg in jpegs:
            images += self._decoded([jpeg])
        return images

    def _decoded_at_once(self, jpegs: list[Bytes]) -> list[ImageTensor]:
        """Returns images as they are stored.

        Raises:
            torch.OutOfMemoryError: the device's memory is too small.
            RuntimeError: one of them can't be decoded, or the device fails.
        """
        try:
            return decode_jpeg(jpegs, mode=ImageReadMode.RGB, device=self._device)  # pyright: ignore[reportReturnType] - a list for a list
        except RuntimeError as error:
            # torchvision's decode_jpegs_cuda.cpp raises all errors anew, as plain RuntimeErrors.
            if "out of memory" in str(error):
                raise torch.OutOfMemoryError(str(error)) from error
            raise

    def _check_device(self) -> list[ImageTensor]:
        """Decodes a JPEG that is certainly whole.

        Raises:
            UsageError: the device can't do that.
        """
        try:
            return self._decoded_at_once([_whole_jpeg()])
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except RuntimeError as error:
            raise UsageError(
                f"decode=device, but {self._device} can't decode JPEGs ({reason(error)}): give "
                "decode=cpu, or install a torchvision that was built with nvJPEG"
            ) from error

    def _check_resampling(self, images: list[ImageTensor]) -> None:
        """Makes squares of some images, for which a GPU's kernel is compiled.

        Raises:
            UsageError: it can't be compiled.
        """
        cuts = []
        for image in images:
            height, width = image.shape[1:]
            cuts.append(Cut(steps=(whole(height, width, (8, 8)),)))
        try:
            if images:
                squares(images, batch_cuts(cuts))
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except _not_compiled_errors() as error:
            raise UsageError(
                f"decode=device needs a kernel that Triton can't compile here ({reason(error)}): "
                "give decode=cpu, or install a C compiler and Python.h (the python3-dev package)"
            ) from error

    def _count(self, message: UndecodedMessage, on_cpu: Mapping[int, Sample]) -> None:
        """Counts JPEGs that were sent, and those among `on_cpu` that only the CPU could decode.

        Raises:
            UsageError: the latter are too many.
        """
        failed = []
        for place, sample in on_cpu.items():
            # Another index is that of an image that replaces one which can't be read at all.
            if sample.pixels is not None and sample.index == message.indices[place]:
                failed.append(sample.index)
        # Two threads make batches.
        with self._counting:
            self._n_jpegs += message.pixels_sizes.count(None)
            self._n_failed += len(failed)
            self._note_failed(failed)
            n_jpegs, n_all_failed = self._n_jpegs, self._n_failed
        if n_all_failed > max(_FEW_FAILED, _MOST_FAILED * n_jpegs):
            raise UsageError(
                f"decode=device, but {self._device} can't decode {n_all_failed} of {n_jpegs} "
                "JPEGs, which the CPU can: give decode=cpu"
            )
        if failed:
            # The same text each time, so that Python shows it once.
            warnings.warn(
                f"JPEGs that {self._device} can't decode are decoded on the CPU", stacklevel=2
            )


def _not_compiled_errors() -> tuple[type[Exception], ...]:
    """Returns the errors of a kernel that can't be compiled."""
    errors: list[type[Exception]] = [
        *(RuntimeError, OSError, ImportError, subprocess.SubprocessError)
    ]
    # Triton comes with builds of torch for GPUs alone.
    with contextlib.suppress(ImportError):
        from triton.errors import TritonError

        errors.append(TritonError)
    return tuple(errors)


@functools.cache
def _streams_of(device: torch.device) -> "queue.SimpleQueue[torch.cuda.Stream]":
    """Returns the streams of a device that are free, one for each thread that makes batches.

    Memory that a stream has freed is used again by that stream alone. So all loaders of a process
    share these, or each would reserve memory anew.
    """
    streams: queue.SimpleQueue[torch.cuda.Stream] = queue.SimpleQueue()
    for _ in range(_BATCHES_AT_ONCE):
        streams.put(torch.cuda.Stream(device))
    return streams


@functools.cache
def _whole_jpeg() -> Bytes:
    """Returns a small JPEG of the kind that all decoders take."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG")
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def _upright(image: ImageTensor, transposition: Image.Transpose | None) -> ImageTensor:
    """Returns an image turned upright, as Pillow's `transpose` does."""
    if transposition is None:
        return image
    swaps_axes, mirrored_axes = _TURNED[transposition]
    turned = image.mT if swaps_axes else image
    return turned.flip(mirrored_axes)


def _stacked(rows: list[ImageTensor], device: torch.device) -> UInt8[Tensor, "b 3 s s"]:
    """Returns squares as a batch, which may be empty."""
    if not rows:
        return torch.empty(0, 3, 0, 0, dtype=torch.uint8, device=device)
    return torch.stack(rows)
