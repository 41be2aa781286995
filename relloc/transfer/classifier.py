"""Fine-tuning a classifier: its network, its training data, and its accuracy."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

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
from relloc.features.source import EncodeConfig, SeededIndex
from relloc.models.backbone import Backbone
from relloc.seeds import Use, seed_for
from relloc.transfer.loop import MicroBatch, split_for_rank

# The numbers k of top-k accuracy that are reported.
TOP = (1, 5)
# Convolutions ask for some height and width, also of no images.
_SIDE_OF_NO_IMAGES = 64


class Classifier(nn.Module):
    """A backbone and one linear layer on its average-pooled last stage.

    Weights of the linear layer are drawn from N(0, 0.01), by `seed`; its biases are zero.
    """

    def __init__(self, backbone: Backbone, n_classes: int, *, seed: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.stage_channels[-1], n_classes)
        # A generator of its own: the weights depend on the seed, not on what was drawn before.
        generator = torch.Generator()
        generator.manual_seed(seed_for(Use.FINE_TUNING_WEIGHTS, seed))
        nn.init.normal_(
            self.head.weight,
            std=0.01,
            generator=generator,
        )
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b classes"]:
        maps = self.backbone(images)
        pooled = maps["feature5"].mean(dim=(2, 3))
        return self.head(pooled)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingViews:
    """Labeled images in random views and random order, divided among the processes of a run.

    A step has `batch` images over all processes; the last step of an epoch has what remains. Order
    and views depend on `seed`, epoch and image alone, so that any step can be read again.
    """

    images: ImageSet
    view: View
    batch: int
    encode_config: EncodeConfig
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps in an epoch, with the last one, which may have fewer images."""
        full_steps, rest = divmod(len(self.images), self.batch)
        return full_steps + 1 if rest else full_steps

    def micro_batches(
        self,
        first: int,
        end: int,
        what: str,
    ) -> Iterator[Sequence[MicroBatch[ImageBatch]]]:
        """Yields this process's micro-batch of each step from `first` to before `end`.

        `what` is the text beside the progress bar.

        Raises:
            DataError: too many images can't be read.
        """
        keys = self._keys(first, end)
        read = self.encode_config.read(
            self.images,
            self.view,
            keys,
            end - first,
            what,
        )
        for views in read:
            # Unreadable images are missing, so samples are counted after reading.
            yield [MicroBatch(content=views, samples=len(views.pixels))]

    def _keys(self, first: int, end: int) -> Iterator[list[SeededIndex]]:
        """Yields this process's images of each step, with the seeds of their views."""
        order: Sequence[int] = []
        for step in range(first, end):
            epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
            is_new_epoch = step_of_epoch == 0
            if step == first or is_new_epoch:
                # A resumed training may begin within an epoch, whose order is drawn again.
                order_seed = seed_for(Use.FINE_TUNING_ORDER, self.seed, epoch)
                rng = np.random.default_rng(order_seed)
                order = rng.permutation(len(self.images)).tolist()
            start = step_of_epoch * self.batch
            step_indices = order[start : start + self.batch]
            (own_indices,) = split_for_rank(step_indices)
            keys = []
            for index in own_indices:
                view_seed = seed_for(Use.FINE_TUNING_VIEW, self.seed, epoch, index)
                keys.append((index, view_seed))
            yield keys

    def loss_function(self, network: Classifier) -> Callable[[ImageBatch], Float[Tensor, ""]]:
        """Returns the function that `loss` is, compiled for whole batches if the run compiles."""
        compiled = mean_cross_entropy
        # Synchronized batch norm waits for other processes, which nothing compiled can do.
        if ranks.world_size() == 1:
            compiled = self.encode_config.compile(mean_cross_entropy)

        def loss_of(views: ImageBatch) -> Float[Tensor, ""]:
            # The last step of an epoch has fewer images, and would be compiled anew.
            is_whole = len(views.pixels) == self.batch
            return self.loss(network, views, compiled if is_whole else mean_cross_entropy)

        return loss_of

    def loss(
        self,
        network: Classifier,
        views: ImageBatch,
        compute: Callable[..., Float[Tensor, ""]] | None = None,
    ) -> Float[Tensor, ""]:
        """Returns the mean cross-entropy of a batch, by `mean_cross_entropy` or `compute`.

        Of a batch without images it is NaN, but its gradients are zero, so that a process without
        readable images can take part in synchronized batch norm.
        """
        pixels = views.pixels
        if not len(pixels):
            no_images = (0, 3, _SIDE_OF_NO_IMAGES, _SIDE_OF_NO_IMAGES)
            pixels = torch.zeros(no_images, dtype=torch.uint8)
        images = self.encode_config.to_device(pixels)
        labels = labels_of(self.images)[views.indices].to(images.device)
        compute = compute or mean_cross_entropy
        return compute(network, images, labels)


def mean_cross_entropy(
    network: Classifier, images: Float[Tensor, "b 3 h w"], labels: Int[Tensor, "b"]
) -> Float[Tensor, ""]:
    """Returns the mean cross-entropy of normalized images; NaN of none."""
    # Cross-entropy of bfloat16 logits would be too coarse.
    logits = network(images).float()
    return cross_entropy(logits, labels)


def labels_of(images: ImageSet) -> Int[Tensor, "n"]:
    """Returns the labels of all images. Raises `DataError` where images have none."""
    if images.labels is None:
        raise DataError(
            f"{images.name} {images.split} has no labels, which fine-tuning needs: "
            "give labeled images"
        )
    return torch.as_tensor(images.labels)


@torch.no_grad()
def count_top_hits(
    network: Classifier,
    images: ImageSet,
    view: View,
    encode_config: EncodeConfig,
) -> list[int]:
    """Counts for how many images the right class is the first, or among the first five, answers.

    The processes of a run share the work, and all get the counts. `view` must not be random.

    Returns:
        Top-1 hits, top-5 hits, and the number of images that were classified.

    Raises:
        DataError: too many images can't be read, or none can be.
    """
    network.eval()
    labels = labels_of(images)
    (own_indices,) = split_for_rank(range(len(images)))
    batches = []
    for start in range(0, len(own_indices), encode_config.batch):
        indices = own_indices[start : start + encode_config.batch]
        # The seed of a view that is not random has no effect.
        batches.append([(index, index) for index in indices])
    what = f"classifying {images.name} {images.split}"
    counts = torch.zeros(len(TOP) + 1, dtype=torch.int64)
    for views in encode_config.read(images, view, batches, len(batches), what):
        if not len(views.pixels):
            continue
        with torch.autocast(
            encode_config.device.type,
            torch.bfloat16,
            enabled=encode_config.bf16,
        ):
            logits = network(encode_config.to_device(views.pixels))
        logits = logits.float()
        targets = labels[views.indices].to(logits.device)
        # Fewer classes than five: all of them are among the first answers.
        n_answers = min(max(TOP), logits.shape[1])
        answers = logits.topk(n_answers, dim=1).indices
        is_right = answers == targets.unsqueeze(1)
        hits = [int(is_right[:, :top].sum()) for top in TOP]
        counts += torch.tensor([*hits, len(targets)])
    # Each process has counted its own images; percentages are of those of all processes.
    counts = ranks.total(counts)
    n_classified = counts[-1]
    if not n_classified:
        raise DataError(
            f"none of the images of {images.name} {images.split} can be read, "
            "so accuracy has no value"
        )
    return counts.tolist()
