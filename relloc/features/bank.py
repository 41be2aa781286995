"""Features that are kept in memory, and how much memory they take."""

import dataclasses
from collections.abc import Iterator, Sequence

import psutil
import torch
from jaxtyping import Float, Int
from torch import Tensor

from relloc.errors import DataError, UsageError
from relloc.features.source import FeatureBatch, FeatureSource
from relloc.terminal import quantity

_BYTES_PER_FEATURE = 4  # float32
_GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bank:
    """A `FeatureSource` that is kept in memory: one matrix per layer, with one row per image."""

    features: dict[str, Float[Tensor, "n _d"]]
    labels: Int[Tensor, "n *classes"]
    n_classes: int
    channels: dict[str, int]

    @property
    def n(self) -> int:
        return len(self.labels)

    @property
    def dims(self) -> dict[str, int]:
        return {layer: rows.shape[1] for layer, rows in self.features.items()}

    def batches(
        self,
        indices: Int[Tensor, "m"],
        size: int,
        layers: Sequence[str],
        epoch: int = 0,
        epochs: int = 1,
    ) -> Iterator[FeatureBatch]:
        # Features were computed once, so that `epoch` and `epochs` have no effect.
        for batch in indices.split(size):
            features = {layer: self.features[layer][batch] for layer in layers}
            yield features, self.labels[batch]


def fill_bank(
    source: FeatureSource,
    layers: Sequence[str],
    size: int,
    device: torch.device,
    indices: Int[Tensor, "m"] | None = None,
) -> Bank:
    """Computes the features of a source once and keeps them in the memory of `device`.

    Images are those at `indices`, by default all; `size` of them are encoded at once. Images that
    can't be read have no row.

    Raises:
        DataError: none of the images can be read.
        UsageError: the memory is not large enough.
    """
    indices = torch.arange(source.n) if indices is None else indices
    needed_gib = bank_gib(source, layers, len(indices))
    available_gib = free_gib(device)
    too_large = UsageError(
        f"features of {quantity(len(indices), 'image')} at {', '.join(layers)} take "
        f"{format_gib(needed_gib)}, "
        f"but the memory of {device} has only {format_gib(available_gib)} free: name fewer layers, "
        "use a smaller data set, or free memory"
    )
    if needed_gib > available_gib:
        raise too_large
    # Each matrix is allocated once and filled batch by batch. Joining a list of batches at the end
    # would need the memory twice.
    matrices = {}
    try:
        for layer in layers:
            matrices[layer] = torch.empty(len(indices), source.dims[layer], device=device)
    except RuntimeError as error:  # an allocator that is asked for too much raises nothing narrower
        raise too_large from error
    labels = []
    n_filled = 0
    for features, batch_labels in source.batches(indices, size, layers):
        end = n_filled + len(batch_labels)
        for layer, matrix in matrices.items():
            matrix[n_filled:end] = features[layer]
        labels.append(batch_labels)
        n_filled = end
    if not labels:
        raise DataError("none of the images can be read, so there are no features to evaluate")
    # Unreadable images leave rows at the end unused.
    return Bank(
        features={layer: matrix[:n_filled] for layer, matrix in matrices.items()},
        labels=torch.cat(labels),
        n_classes=source.n_classes,
        channels=source.channels,
    )


def bank_device(gib: float, device: torch.device) -> torch.device:
    """Returns `device` if a bank of `gib` takes less than half of its free memory, else the CPU."""
    # The other half is for what the evaluation computes from the features.
    if device.type == "cuda" and gib < free_gib(device) / 2:
        return device
    return torch.device("cpu")


def bank_gib(source: FeatureSource, layers: Sequence[str], n: int | None = None) -> float:
    """Returns the memory that `fill_bank` takes for `n` images (by default all), in GiB."""
    n_images = source.n if n is None else n
    values_per_image = sum(source.dims[layer] for layer in layers)
    return values_per_image * n_images * _BYTES_PER_FEATURE / _GIB


def free_gib(device: torch.device) -> float:
    """Returns the memory of `device` that can still be taken, in GiB.

    For a CPU that is what Linux calls available, caches included.
    """
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return free_bytes / _GIB
    return psutil.virtual_memory().available / _GIB


def format_gib(gib: float) -> str:
    """Returns text such as "9.77 GiB", with three digits also of small numbers."""
    return f"{gib:.3g} GiB" if gib < 100 else f"{gib:.0f} GiB"
