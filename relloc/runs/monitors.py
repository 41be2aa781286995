"""What a network has learned so far, asked between two steps of training and without a trace in it."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
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
from relloc.features.pool import pooled_layers
from relloc.features.source import EncodeConfig
from relloc.features.spectrum import alpha_req, rankme
from relloc.features.voting import vote
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
        named = {f"monitor/pretext/top1_{name}": value for name, value in zip(POSITIONS, by_position, strict=True)}
        return {"monitor/pretext/top1": top1} | named

    def _features(self) -> dict[str, float]:
        labeled = self.data.labeled
        held_out = self._encode(self._held_out_views, LAYERS if labeled else SPECTRUM_LAYERS)
        values = {}
        for layer in SPECTRUM_LAYERS:
            features = held_out[layer].cpu()  # a small decomposition: LAPACK's time is known, a GPU's is not
            values[f"monitor/rankme/{layer}"] = _where_defined(rankme, features)
            values[f"monitor/alpha_req/{layer}"] = _where_defined(alpha_req, features)
        return values | self._knn(held_out) if labeled else values

    def _knn(self, queries: dict[str, Tensor]) -> dict[str, float]:
        bank = self._encode(self._training_views, LAYERS)
        known = _labels(self.data.train, self._training_views)
        truth = _labels(self.data.held_out, self._held_out_views)
        k, n_classes = min(self.k, len(known)), len(self.data.train.classes)

        def top1(layer: str) -> float:
            found = vote(queries[layer], bank[layer], known, k=[k], temperature=_TEMPERATURE, n_classes=n_classes)
            return 100 * int((found[k].cpu() == truth).sum()) / len(truth)

        return {f"monitor/knn/{layer}/top1_k{k}": _where_defined(top1, layer) for layer in LAYERS}

    def _encode(self, views: ImageBatch, layers: tuple[str, ...]) -> dict[str, Tensor]:
        """Features (n d) of each layer, on the device."""
        found = []
        for pixels in views.pixels.split(self.reading.batch):
            images = self.reading.to_device(pixels)
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self.reading.bf16):
                found.append(pooled_layers(self.model.backbone, images, layers))
        return {layer: torch.cat([features[layer] for features in found]) for layer in layers}

    @functools.cached_property
    def _crops(self) -> ImageBatch:
        images = self.data.held_out
        keys = [(index,) for index in evenly_spaced(len(images), self.n_images)]
        batches = [keys[start : start + self.reading.batch] for start in range(0, len(keys), self.reading.batch)]
        crops = Crops(images, self.patches.grid, use=Use.HELD_OUT_CROP, seed=self.seed, centered=True)
        loaded = load(crops, batches, workers=self.reading.workers, pin=False, stopping=self.reading.stopping)
        return _joined(loaded, images)

    @functools.cached_property
    def _held_out_views(self) -> ImageBatch:
        return self._views(self.data.held_out)

    @functools.cached_property
    def _training_views(self) -> ImageBatch:
        return self._views(self.data.train)

    def _views(self, images: ImageSet) -> ImageBatch:
        places = evenly_spaced(len(images), self.n_images)
        keys = [(place, 0) for place in places]  # a still view knows no chance
        return _joined(self.reading.views(images, self.view, keys, self.reading.batch), images)


def _joined(loaded: Iterable[ImageBatch], images: ImageSet) -> ImageBatch:
    batches = list(loaded)
    unreadable = {name: reason for batch in batches for name, reason in batch.unreadable.items()}
    good = [batch for batch in batches if len(batch.pixels)]
    if not good:
        first, reason = next(iter(unreadable.items()), ("the whole set", "it is empty"))
        raise DataError(
            f"monitors can use none of the {len(unreadable)} images they chose of {images.name} {images.split}; "
            f"the first is {first}: {reason}. Mend or remove them"
        )
    return ImageBatch(
        pixels=torch.cat([batch.pixels for batch in good]),
        indices=torch.cat([batch.indices for batch in good]),
        unreadable=unreadable,
    )


def _labels(images: ImageSet, views: ImageBatch) -> Tensor:
    return torch.as_tensor(images.labels)[views.indices]


def _where_defined(measure: Callable[[T], float], of: T) -> float:
    try:
        return measure(of)
    except ValueError:  # collapsed or diverged features: told by the number, never a reason to stop training
        return math.nan
