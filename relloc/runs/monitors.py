"""What a network has learned so far, asked between two steps of training and without a trace in it."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from relloc.data.crops import Crops
from relloc.data.image_set import ImageSet, Splits
from relloc.data.loader import ImageBatch, load
from relloc.data.subsets import evenly_spaced
from relloc.data.views import View
from relloc.errors import DataError
from relloc.features.source import EncodeConfig, encode
from relloc.features.spectrum import alpha_req, rankme
from relloc.features.voting import vote
from relloc.geometry import PatchGrid
from relloc.patches.pipeline import PatchPipeline
from relloc.pretext.confusion_picture import draw_confusion
from relloc.pretext.held_out import POSITIONS, answers, confusion, evaluating
from relloc.pretext.objective import RelativeLocation
from relloc.results import LAYERS
from relloc.seeds import Use

SPECTRUM_LAYERS = ("feature4", "feature5", "avgpool")
_TEMPERATURE = 0.07  # protocols.md 3.7
T = TypeVar("T")


def confusion_picture(step: int) -> str:
    """Name, below the run folder, of the picture of what was answered after `step` steps."""
    return f"confusion/step_{step:09d}.png"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Monitors:
    """Numbers by name for the journal whenever it is called with the steps done, and a picture in `folder`.

    On `n_images` held-out images (all, where there are fewer), evenly spaced over the set:
    `monitor/pretext/top1`, the accuracy over the eight pairs of each center crop, and one
    `top1_up_left`, ... a position; of the features of whole center views `monitor/rankme/LAYER` and
    `monitor/alpha_req/LAYER`, nan where the features define none (see `relloc.features.spectrum`);
    and, on labeled data, `monitor/knn/LAYER/top1_kK`, the weighted vote (T = 0.07) of the K nearest
    of as many training views: `k`, or all where there are fewer. Accuracies are percent.

    Batch norm uses its statistics as trained: gathered on patches, they fit whole views badly, so
    numbers of views compare with each other, not with recalibrated evaluations.

    Pixels are decoded at the first call and kept as bytes; images that can't be read are left out.
    Weights, statistics, modes of modules, gradients and torch's global generators are left as they
    were: training goes on as if nothing had been asked.

    Raises (when called):
        DataError: none of the images chosen of a split can be used.
    """

    model: RelativeLocation
    patches: PatchPipeline
    data: Splits
    reading: EncodeConfig
    view: View
    n_images: int
    k: int
    seed: int
    folder: Path

    @torch.no_grad()
    def __call__(self, step: int) -> dict[str, float]:
        # Starting to load draws from torch's global generator, which training may be reading.
        with torch.random.fork_rng(devices=[]), evaluating(self.model):
            return self._pretext(step) | self._features()

    def _pretext(self, step: int) -> dict[str, float]:
        given = answers(
            self.model,
            self._crops.pixels.split(self.reading.batch),
            self.patches,
            seed=self.seed,
            device=self.reading.device,
            bf16=self.reading.bf16,
        )
        counts = confusion(given)
        top1 = 100 * float(counts.diagonal().sum() / counts.sum())
        draw_confusion(counts, self.folder / confusion_picture(step), step=step, top1=top1)
        by_position = (100 * counts.diagonal() / counts.sum(dim=1)).tolist()
        named = {
            f"monitor/pretext/top1_{name}": value
            for name, value in zip(POSITIONS, by_position, strict=True)
        }
        return {"monitor/pretext/top1": top1} | named

    def _features(self) -> dict[str, float]:
        held_out = self._encode(self._views[0])
        values = {}
        for layer in SPECTRUM_LAYERS:
            features = held_out[
                layer
            ].cpu()  # a small decomposition: LAPACK's time is known, a GPU's is not
            values[f"monitor/rankme/{layer}"] = _where_defined(rankme, features)
            values[f"monitor/alpha_req/{layer}"] = _where_defined(alpha_req, features)
        return values | self._knn(held_out) if self.data.labeled else values

    def _knn(self, queries: dict[str, Tensor]) -> dict[str, float]:
        held_out_views, training_views = self._views
        bank = self._encode(training_views)
        known = torch.as_tensor(self.data.train.labels)[training_views.indices]
        truth = torch.as_tensor(self.data.held_out.labels)[held_out_views.indices]
        k, n_classes = min(self.k, len(known)), len(self.data.train.classes)

        def top1(layer: str) -> float:
            found = vote(
                queries[layer],
                bank[layer],
                known,
                k=[k],
                temperature=_TEMPERATURE,
                n_classes=n_classes,
            )
            return 100 * int((found[k].cpu() == truth).sum()) / len(truth)

        return {f"monitor/knn/{layer}/top1_k{k}": _where_defined(top1, layer) for layer in LAYERS}

    def _encode(self, views: ImageBatch) -> dict[str, Tensor]:
        """Features (n d) of each layer, on the device."""
        reading = self.reading
        found = []
        for pixels in views.pixels.split(reading.batch):
            images = pixels.to(reading.device, non_blocking=True).float()
            found.append(encode(self.model.backbone, images, LAYERS, reading.bf16))
        return {layer: torch.cat([features[layer] for features in found]) for layer in LAYERS}

    @functools.cached_property
    def _crops(self) -> ImageBatch:
        images = self.data.held_out
        indices = evenly_spaced(len(images), self.n_images)
        return _joined(
            held_out_crops(images, indices, self.patches.grid, self.seed, self.reading), images
        )

    @functools.cached_property
    def _views(self) -> list[ImageBatch]:
        """Whole views of held-out images, and of training images where both have labels."""
        views = []
        for images in (self.data.held_out, self.data.train)[: 1 + self.data.labeled]:
            keys = [
                (index, 0) for index in evenly_spaced(len(images), self.n_images)
            ]  # still views: nothing is drawn
            views.append(
                _joined(self.reading.views(images, self.view, keys, self.reading.batch), images)
            )
        return views


def held_out_crops(
    images: ImageSet, indices: Sequence[int], grid: PatchGrid, seed: int, config: EncodeConfig
) -> Iterator[ImageBatch]:
    """The middle of each of the images, which held-out pretext accuracy is measured on."""
    crops = Crops(images, grid, use=Use.HELD_OUT_CROP, seed=seed, centered=True)
    batches = [
        [(index,) for index in indices[start : start + config.batch]]
        for start in range(0, len(indices), config.batch)
    ]
    pin = config.device.type == "cuda"
    return load(crops, batches, workers=config.workers, pin=pin, stopping=config.stopping)


def _joined(loaded: Iterable[ImageBatch], images: ImageSet) -> ImageBatch:
    """All batches in one, without the images that can't be used."""
    batches = list(loaded)
    good = [batch for batch in batches if len(batch.pixels)]
    if not good:
        unreadable = {
            name: reason for batch in batches for name, reason in batch.unreadable.items()
        }
        first, reason = next(iter(unreadable.items()), ("the whole set", "it is empty"))
        raise DataError(
            f"monitors can use none of the {len(unreadable)} images they chose of {images.name} {images.split}; "
            f"the first is {first}: {reason}. Mend or remove them"
        )
    pixels, indices = (
        torch.cat([batch.pixels for batch in good]),
        torch.cat([batch.indices for batch in good]),
    )
    return ImageBatch(pixels=pixels, indices=indices, unreadable={})


def _where_defined(measure: Callable[[T], float], of: T) -> float:
    try:
        return measure(of)
    except (
        ValueError
    ):  # collapsed or diverged features: told by the number, never a reason to stop training
        return math.nan
