"""Measures what a network has learned so far, between two steps of training.

Monitors leave no trace in the training: with and without them it ends with the same weights.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

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
from relloc.pretext.held_out import answers, confusion, evaluating, predict_positions
from relloc.pretext.questions import POSITIONS
from relloc.pretext.relative_location import RelativeLocation, about_center
from relloc.results import LAYERS
from relloc.seeds import Use

SPECTRUM_LAYERS = ("feature4", "feature5", "avgpool")
_TEMPERATURE = 0.07  # of weighted nearest neighbors, docs/protocols.md 3.7
T = TypeVar("T")


def confusion_picture(step: int) -> str:
    """Returns the path, below the run folder, of the confusion matrix drawn after `step` steps."""
    return f"confusion/step_{step:09d}.png"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Monitors:
    """Measures a model in training: `monitors(step)` returns numbers by name, and draws a picture.

    They are measured on `n_images` held-out images (all, where there are fewer), evenly spaced over
    the set:

    - `monitor/pretext/top1`: accuracy over the eight pairs of each center crop, and
      `monitor/pretext/top1_up_left` and so on for each position, whatever pairs are trained on
    - `monitor/pretext/top1_trained`: accuracy over the questions of the training, where these are
      others
    - `monitor/rankme/LAYER` and `monitor/alpha_req/LAYER`: spectra of the features of whole center
      views, nan where the features define none (see `relloc.features.spectrum`)
    - `monitor/knn/LAYER/top1_kK`, on labeled data: weighted vote (T = 0.07) of the K nearest of as
      many training views; K is `k`, or all where there are fewer

    Accuracies are percent. Batch norm uses its statistics as trained. Gathered on patches, they fit
    whole views badly, so numbers of views compare with each other, not with evaluations whose batch
    norm is recalibrated.

    Images are decoded at the first call and stay in memory as bytes; those that can't be read are
    left out. Weights, statistics, modes of modules, gradients and torch's global generators are
    left as they were.

    Raises (when called):
        DataError: none of the images chosen of a split can be used.
    """

    model: RelativeLocation
    patches: PatchPipeline
    data: Splits
    config: EncodeConfig
    view: View
    n_images: int
    k: int
    seed: int
    folder: Path

    @torch.no_grad()
    def __call__(self, step: int) -> dict[str, float]:
        # Starting loader processes draws a number from torch's global generator, on which training
        # depends as well.
        with torch.random.fork_rng(devices=[]), evaluating(self.model):
            return self._pretext(step) | self._features()

    def _pretext(self, step: int) -> dict[str, float]:
        """Measures the pretext accuracy: of pairs with the center, and of what is trained."""
        center = about_center(self.model)
        values = {}
        if center is not None:
            values |= self._center_pairs(center, step)
        if center is not self.model:
            values["monitor/pretext/top1_trained"] = self._trained_questions()
        return values

    def _center_pairs(self, center: nn.Module, step: int) -> dict[str, float]:
        """Measures the accuracy in all and of each position, and draws the confusions."""
        predicted = predict_positions(
            center,
            self._crops.pixels.split(self.config.batch),
            self.patches.about_center,
            seed=self.seed,
            device=self.config.device,
            bf16=self.config.bf16,
        )
        # Rows are true positions, columns predicted ones: right answers are on the diagonal.
        counts = confusion(predicted)
        top1 = 100 * float(counts.diagonal().sum() / counts.sum())
        picture = self.folder / confusion_picture(step)
        draw_confusion(counts, picture, heading=f"after step {step:,}", top1=top1)
        by_position = (100 * counts.diagonal() / counts.sum(dim=1)).tolist()
        values = {"monitor/pretext/top1": top1}
        for position, accuracy in zip(POSITIONS, by_position, strict=True):
            values[f"monitor/pretext/top1_{position}"] = accuracy
        return values

    def _trained_questions(self) -> float:
        """Returns the accuracy over the questions that the model is trained on, in percent."""
        questions = self.model.questions
        answered = answers(
            self.model,
            questions,
            self._trained_crops.pixels.split(self.config.batch),
            self.patches,
            seed=self.seed,
            device=self.config.device,
            bf16=self.config.bf16,
        )
        n_right = sum(int(questions.hits(*of_batch).sum()) for of_batch in answered)
        return 100 * n_right / (len(self._trained_crops.pixels) * questions.n_questions)

    def _features(self) -> dict[str, float]:
        """Measures the features of whole views: their spectra, and nearest neighbors by label."""
        held_out = self._encode(self._views[0])
        values = {}
        for layer in SPECTRUM_LAYERS:
            # The matrix is small. On a CPU its decomposition takes a time that is known beforehand.
            features = held_out[layer].cpu()
            values[f"monitor/rankme/{layer}"] = _nan_if_undefined(rankme, features)
            values[f"monitor/alpha_req/{layer}"] = _nan_if_undefined(alpha_req, features)
        if self.data.labeled:
            values |= self._knn(held_out)
        return values

    def _knn(self, queries: dict[str, Tensor]) -> dict[str, float]:
        """Classifies held-out views, given their features, by their nearest training views."""
        held_out_views, training_views = self._views
        bank = self._encode(training_views)
        # Unreadable images were left out, so labels are looked up by index.
        bank_labels = torch.as_tensor(self.data.train.labels)[training_views.indices]
        true_labels = torch.as_tensor(self.data.held_out.labels)[held_out_views.indices]
        k = min(self.k, len(bank_labels))
        n_classes = len(self.data.train.classes)

        def top1(layer: str) -> float:
            predictions = vote(
                queries[layer],
                bank[layer],
                bank_labels,
                k=[k],
                temperature=_TEMPERATURE,
                n_classes=n_classes,
            )
            n_right = int((predictions[k].cpu() == true_labels).sum())
            return 100 * n_right / len(true_labels)

        values = {}
        # `vote` raises UsageError, which is a ValueError, if features are not finite.
        for layer in LAYERS:
            values[f"monitor/knn/{layer}/top1_k{k}"] = _nan_if_undefined(top1, layer)
        return values

    def _encode(self, views: ImageBatch) -> dict[str, Tensor]:
        """Returns the features (n d) of each layer, on the device."""
        config = self.config
        features_of_batches = []
        for pixels in views.pixels.split(config.batch):
            # Bytes are moved, a quarter of the size of floats.
            on_device = pixels.to(config.device, non_blocking=True)
            features = encode(self.model.backbone, on_device, LAYERS, config.bf16)
            features_of_batches.append(features)
        return {
            layer: torch.cat([features[layer] for features in features_of_batches])
            for layer in LAYERS
        }

    # Decoded once: at each turn the same images are asked about, so that curves are comparable.
    @functools.cached_property
    def _crops(self) -> ImageBatch:
        """Center crops of held-out images, as pairs with the center are asked about."""
        return self._crops_for(self.patches.about_center.grid)

    @functools.cached_property
    def _trained_crops(self) -> ImageBatch:
        """Center crops of held-out images, as the questions of the training are asked about."""
        grid = self.patches.grid
        return self._crops if grid.rows == 3 else self._crops_for(grid)

    def _crops_for(self, grid: PatchGrid) -> ImageBatch:
        images = self.data.held_out
        indices = evenly_spaced(len(images), self.n_images)
        batches = held_out_crops(images, indices, grid, self.seed, self.config)
        return _joined(batches, images)

    @functools.cached_property
    def _views(self) -> list[ImageBatch]:
        """Whole views of held-out images, and then of training images where both have labels."""
        sets = [self.data.held_out]
        if self.data.labeled:
            sets.append(self.data.train)
        views = []
        for images in sets:
            indices = evenly_spaced(len(images), self.n_images)
            # The second number of a key seeds random views; center views use none.
            keys = [(index, 0) for index in indices]
            batches = self.config.views(images, self.view, keys, self.config.batch)
            views.append(_joined(batches, images))
        return views


def held_out_crops(
    images: ImageSet, indices: Sequence[int], grid: PatchGrid, seed: int, config: EncodeConfig
) -> Iterator[ImageBatch]:
    """Yields batches of center crops, on which held-out pretext accuracy is measured."""
    crops = Crops(images, grid, use=Use.HELD_OUT_CROP, seed=seed, centered=True)
    batches = []
    for start in range(0, len(indices), config.batch):
        batch_indices = indices[start : start + config.batch]
        batches.append([(index,) for index in batch_indices])
    pin = config.device.type == "cuda"
    return load(crops, batches, workers=config.workers, pin=pin, stopping=config.stopping)


def _joined(loaded: Iterable[ImageBatch], images: ImageSet) -> ImageBatch:
    """Returns all batches as one, without the images that can't be used.

    Raises:
        DataError: none of the images can be used.
    """
    batches = list(loaded)
    readable = [batch for batch in batches if len(batch.pixels)]
    if not readable:
        unreadable: dict[str, str] = {}
        for batch in batches:
            unreadable |= batch.unreadable
        # One example tells whether the images are damaged, unreachable, or not images at all.
        first, reason = next(iter(unreadable.items()), ("the whole set", "it is empty"))
        raise DataError(
            f"monitors can use none of the {len(unreadable)} images they chose of {images.name} "
            f"{images.split}; the first is {first}: {reason}. Repair or remove them"
        )
    pixels = torch.cat([batch.pixels for batch in readable])
    indices = torch.cat([batch.indices for batch in readable])
    # Unreadable images are reported where they are trained or evaluated on, not here.
    return ImageBatch(pixels=pixels, indices=indices, unreadable={})


def _nan_if_undefined(measure: Callable[[T], float], argument: T) -> float:
    """Returns `measure(argument)`, or nan where that is not defined."""
    try:
        return measure(argument)
    except ValueError:
        # Features have collapsed or diverged. The curve shows nan, and training goes on.
        return math.nan
