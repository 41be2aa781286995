"""A classifier on a backbone: its network, the images that it is trained on, and how often it is right."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from relloc import ranks
from relloc.data.image_set import ImageSet
from relloc.data.loader import ImageBatch
from relloc.data.views import View
from relloc.errors import DataError
from relloc.features.source import EncodeConfig
from relloc.models.backbone import Backbone
from relloc.seeds import Use, seed_for
from relloc.transfer.loop import Part, divided

TOP = (1, 5)


class Classifier(nn.Module):
    """A backbone and one linear layer on its average-pooled last stage, N(0, 0.01), biases zero."""

    def __init__(self, backbone: Backbone, n_classes: int, *, seed: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.stage_channels[-1], n_classes)
        generator = torch.Generator().manual_seed(seed_for(Use.FINE_TUNING_WEIGHTS, seed))
        nn.init.normal_(self.head.weight, std=0.01, generator=generator)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b classes"]:
        return self.head(self.backbone(images)["feature5"].mean(dim=(2, 3)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingViews:
    """Labeled images in random views and random order, `batch` a step; the last step of an epoch has what is left."""

    images: ImageSet
    view: View
    batch: int
    encode_config: EncodeConfig
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.images) // self.batch)

    def parts(self, first: int, end: int, what: str) -> Iterator[Sequence[Part[ImageBatch]]]:
        """This process's part of each of the steps; `what` is what progress calls them.

        Raises:
            DataError: too many images can't be read.
        """
        keys = self._keys(first, end)
        for views in self.encode_config.read(self.images, self.view, keys, end - first, what):
            yield [Part(content=views, samples=len(views.pixels))]

    def _keys(self, first: int, end: int) -> Iterator[list[tuple[int, int]]]:
        """(image, seed of its view) of this process's images of each step."""
        order: Sequence[int] = []
        for step in range(first, end):
            epoch, number = divmod(step, self.steps_per_epoch)
            if step == first or number == 0:
                rng = np.random.default_rng(seed_for(Use.FINE_TUNING_ORDER, self.seed, epoch))
                order = rng.permutation(len(self.images)).tolist()
            (mine,) = divided(order[number * self.batch : (number + 1) * self.batch])
            yield [(index, seed_for(Use.FINE_TUNING_VIEW, self.seed, epoch, index)) for index in mine]

    def loss(self, network: Classifier, views: ImageBatch) -> Float[Tensor, ""]:
        """Mean cross-entropy of a batch; NaN, but with gradients of zero, where none could be read."""
        pixels = views.pixels
        if not len(pixels):
            # Convolutions ask for some height and width, of whatever many images.
            pixels = torch.zeros((0, 3, 64, 64), dtype=torch.uint8)
        logits = network(self.encode_config.to_device(pixels)).float()
        return cross_entropy(logits, labels_of(self.images)[views.indices].to(logits.device))


def labels_of(images: ImageSet) -> Int[Tensor, "n"]:
    """Raises `DataError` where images have no labels."""
    if images.labels is None:
        raise DataError(f"{images.name} {images.split} has no labels to fine-tune with")
    return torch.as_tensor(images.labels)


@torch.no_grad()
def count_top_hits(network: Classifier, images: ImageSet, view: View, encode_config: EncodeConfig) -> list[int]:
    """How many images are right at first, how many among the first five answers, and how many were asked.

    The processes of a run share the work, and all get the counts.

    Raises:
        DataError: too many images can't be read, or all.
    """
    network.eval()
    labels, size = labels_of(images), encode_config.batch
    (mine,) = divided(range(len(images)))
    keys = [(index, index) for index in mine]  # a still view needs no seed
    batches = [keys[start : start + size] for start in range(0, len(keys), size)]
    counts = torch.zeros(len(TOP) + 1, dtype=torch.int64)
    for views in encode_config.read(images, view, batches, len(batches), f"asking {images.name} {images.split}"):
        if not len(views.pixels):
            continue
        with torch.autocast(encode_config.device.type, torch.bfloat16, enabled=encode_config.bf16):
            logits = network(encode_config.to_device(views.pixels)).float()
        target = labels[views.indices].to(logits.device).unsqueeze(1)
        is_right = logits.topk(min(max(TOP), logits.shape[1]), dim=1).indices == target
        counts += torch.tensor([*(int(is_right[:, :top].sum()) for top in TOP), len(target)])
    counts = ranks.total(counts)
    if not counts[-1]:
        raise DataError(f"none of the images of {images.name} {images.split} to ask about can be read")
    return counts.tolist()
