"""Trains the linear heads of all layers together, in one pass over the images per epoch."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from relloc.errors import DataError, UsageError
from relloc.evals.heads import LayerHeads, Sgd
from relloc.evaluation.contract import Context
from relloc.features.source import Features, FeatureSource
from relloc.optimization import milestone_factor
from relloc.seeds import Use, seed_for

_HELD_BACK = 10  # one in ten training images chooses among heads
# Several steps at once read and write less memory, but need twice the products (see
# relloc.evals.heads). That pays on a GPU and not on a CPU.
_STEPS_AT_ONCE = {"cuda": 16, "cpu": 1}
_CPU = torch.device("cpu")

Heads = dict[str, LayerHeads]  # by layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchRequest:
    """The indices of the images of a batch, and whether they are of the held-back tenth."""

    indices: Int[Tensor, "b"]
    is_of_tenth: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class _HeadBatch:
    """A batch that waits to be learned from: normalized features by layer, and labels."""

    rows: dict[str, Tensor]
    labels: Tensor
    is_of_tenth: bool


def draw_held_back(n: int, seed: int) -> Int[Tensor, "m"]:
    """Returns the indices of the tenth of n training images that chooses among heads.

    They are drawn at random by the seed, and at least one.
    """
    generator = torch.Generator().manual_seed(seed_for(Use.HELD_BACK, seed))
    order = torch.randperm(n, generator=generator)
    return order[: max(1, n // _HELD_BACK)]


@dataclasses.dataclass(kw_only=True)
class TrainedHeads:
    """Heads by layer after `epoch` epochs.

    `best`: by layer, the most right answers on validation images that the first head had after any
    epoch; empty if these were not asked for.
    """

    heads: Heads
    epoch: int = 0
    best: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadTraining:
    """Trains all heads with SGD, with one forward pass of the backbone per batch for all of them.

    Learning rates are multiplied by `gamma` at the milestones. Heads that must not see the
    held-back tenth take no step on its images; if there are such heads, a batch is either entirely
    of the tenth or entirely of the rest, and the batches of an epoch come in random order. Batch
    norm, which has no parameters and sees no labels, is computed from all images that any head
    trains on. `steps_at_once` changes speed and rounding only; None chooses what suits the device.
    """

    layers: Sequence[str]  # each has heads of its own
    sgd: Sgd  # the update rule, and the settings of the heads of a layer
    epochs: int
    milestone_epochs: Sequence[int]  # epochs after which learning rates fall
    gamma: float  # what they are multiplied by then
    batch: int  # images per step
    batch_norm: bool  # whether features are normalized before the heads
    steps_at_once: int | None = None

    def fit(
        self,
        source: FeatureSource,
        context: Context,
        *,
        tenth: Int[Tensor, "m"],
        watched: FeatureSource | None,
    ) -> TrainedHeads:
        """Trains to the last epoch, resuming from the context's state.

        Args:
            source: features of the training images.
            context: device, seed and state.
            tenth: indices of the held-back images.
            watched: features on which the first head's best epoch is measured, if any.

        Raises:
            UsageError: features are not finite.
            DataError: a whole batch of images cannot be read, or too few can to train on.
        """
        device = context.device
        heads = {}
        for layer in self.layers:
            heads[layer] = self._new_heads(source, layer, context.seed, device)
        trained = TrainedHeads(heads=heads)
        _resume(trained, context)

        for epoch in range(trained.epoch, self.epochs):
            # Counting right answers below leaves heads in eval mode.
            for of_layer in heads.values():
                of_layer.train()
            n_batches = self._train_epoch(heads, source, tenth, epoch, device, context.seed)
            if not n_batches:
                raise DataError(
                    f"of {source.n} training images too few can be read and are not held back to "
                    "choose among linear heads: no head can be trained on them, give more images"
                )
            check_finite(heads)
            trained.epoch = epoch + 1
            if watched:
                indices = torch.arange(watched.n)
                hits, _ = count_hits(heads, watched, indices, self.batch, device)
                for layer, of_heads in hits.items():
                    first_head = int(of_heads[0])
                    best_so_far = trained.best.get(layer, 0)
                    trained.best[layer] = max(first_head, best_so_far)
            _save(trained, context)
        return trained

    def _new_heads(
        self,
        source: FeatureSource,
        layer: str,
        seed: int,
        device: torch.device = _CPU,
    ) -> LayerHeads:
        """Returns the heads of a layer as they are before training."""
        channels = source.channels[layer] if self.batch_norm else None
        return LayerHeads(
            self.sgd,
            dim=source.dims[layer],
            channels=channels,
            n_classes=source.n_classes,
            seed=seed,
            device=device,
        )

    def _train_epoch(
        self,
        heads: Heads,
        source: FeatureSource,
        tenth: Int[Tensor, "m"],
        epoch: int,
        device: torch.device,
        seed: int,
    ) -> int:
        """Trains for an epoch, and returns how many batches all heads have learned from."""
        factor = milestone_factor(epoch, self.milestone_epochs, self.gamma)
        steps_at_once = self.steps_at_once or _STEPS_AT_ONCE[device.type]
        epoch_seed = seed_for(Use.HEAD_BATCHES, seed, epoch)
        waiting: list[_HeadBatch] = []
        n_learned = 0
        for requests in self.requests(source.n, tenth, epoch_seed):
            for features, labels, is_of_tenth in self._read(source, requests, epoch):
                # Batch norm divides by the variance of a batch, and one image has none.
                if self.batch_norm and len(labels) < 2:
                    continue
                # All heads of a layer share these, so they are normalized once.
                rows = {}
                for layer, of_layer in heads.items():
                    rows[layer] = of_layer.normalized(features[layer].to(device))
                batch = _HeadBatch(
                    rows=rows,
                    labels=labels.to(device, non_blocking=True),
                    is_of_tenth=is_of_tenth,
                )
                waiting.append(batch)
                if not is_of_tenth:
                    n_learned += 1
                if len(waiting) == steps_at_once:
                    self._learn(heads, waiting, factor)
                    waiting = []
        # The last batches of an epoch, which are fewer than steps are taken at once.
        if waiting:
            self._learn(heads, waiting, factor)
        return n_learned

    def _learn(
        self,
        heads: Heads,
        batches: Sequence[_HeadBatch],
        factor: float,
    ) -> None:
        """Takes one step per batch with all heads, except with those that must not see it."""
        active = []
        for batch in batches:
            takes_step = [head.sees_all or not batch.is_of_tenth for head in self.sgd.settings]
            active.append(takes_step)
        coefficients = self.sgd.coefficients(np.array(active), factor)
        labels = [batch.labels for batch in batches]
        for layer, of_layer in heads.items():
            rows = [batch.rows[layer] for batch in batches]
            of_layer.learn(rows, labels, coefficients)

    def requests(
        self,
        n: int,
        tenth: Int[Tensor, "m"],
        seed: int,
    ) -> list[list[BatchRequest]]:
        """Returns the batches of an epoch over n images in random order, as lists for the source.

        Batches that are not full come last, each in a list of its own: a source cuts each list into
        full batches, so that only the last batch of a list may be smaller.
        """
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(n, generator=generator)
        sees_all = [head.sees_all for head in self.sgd.settings]
        if all(sees_all):
            # No head has to be kept from the tenth: batches are drawn from all images.
            batches = []
            for indices in order.split(self.batch):
                batches.append(BatchRequest(indices=indices, is_of_tenth=False))
            return [batches]

        # Batches of the rest, then those of the tenth, if any head trains on it.
        is_of_tenth = torch.isin(order, tenth)
        groups = (False, True) if any(sees_all) else (False,)
        batches = []
        for group in groups:
            for indices in order[is_of_tenth == group].split(self.batch):
                batches.append(BatchRequest(indices=indices, is_of_tenth=group))

        full = [batch for batch in batches if len(batch.indices) == self.batch]
        shuffled = []
        for number in torch.randperm(len(full), generator=generator).tolist():
            shuffled.append(full[number])
        requests = [shuffled] if shuffled else []
        for batch in batches:
            if 0 < len(batch.indices) < self.batch:
                requests.append([batch])
        return requests

    def _read(
        self,
        source: FeatureSource,
        requests: list[BatchRequest],
        epoch: int,
    ) -> Iterator[tuple[Features, Int[Tensor, "_b"], bool]]:
        """Yields features and labels of each batch, and whether it is of the tenth.

        Images that cannot be read are missing in their batch.

        Raises:
            DataError: none of a whole batch can be read. The source leaves such a batch out, so
                it would no longer be known which of the others are of the tenth.
        """
        # Asked for in one go, so that the source can read ahead.
        indices = torch.cat([request.indices for request in requests])
        groups = [request.is_of_tenth for request in requests]
        n_read = 0
        batches = source.batches(indices, self.batch, self.layers, epoch, self.epochs)
        for features, labels in batches:
            yield features, labels, groups[n_read]
            n_read += 1
        is_mixed = len(set(groups)) > 1
        if n_read < len(requests) and is_mixed:
            raise DataError(
                f"none of a whole batch of {self.batch} images can be read, so images that choose "
                "among linear heads can't be told from the others: repair or remove the images "
                "that can't be read"
            )


def _resume(trained: TrainedHeads, context: Context) -> None:
    """Loads what an earlier run of this training saved, if it did."""
    saved = context.state.load()
    if not saved:
        return
    trained.epoch = saved["epoch"]
    trained.best = saved["best"]
    for layer, of_layer in trained.heads.items():
        of_layer.load_state_dict(saved["heads"][layer])


def _save(trained: TrainedHeads, context: Context) -> None:
    """Saves the training after an epoch, for `_resume`."""
    tensors = {}
    for layer, of_layer in trained.heads.items():
        tensors[layer] = of_layer.state_dict()
    state = {
        "epoch": trained.epoch,
        "best": trained.best,
        "heads": tensors,
    }
    context.state.save(state)


def check_finite(heads: Heads) -> None:
    """Checks that all features that heads were given were finite.

    Raises:
        UsageError: some were not; the message names their layers.
    """
    broken = [layer for layer, of_layer in heads.items() if not of_layer.features_are_finite]
    if broken:
        raise UsageError(
            f"features of {', '.join(broken)} are NaN or infinite, so no linear classifier can be "
            "trained on them: the checkpoint is damaged or its numbers overflow. Name other "
            "layers, or try precision=fp32"
        )


@torch.no_grad()
def count_hits(
    heads: Heads,
    source: FeatureSource,
    indices: Int[Tensor, "m"],
    size: int,
    device: torch.device,
) -> tuple[dict[str, Int[Tensor, "heads"]], int]:
    """Returns by layer how many images each head classifies right, and the number of images.

    It leaves the heads in eval mode. Images that cannot be read are not counted. `size` is the
    number of images per batch.

    Raises:
        UsageError: features are not finite.
    """
    counts = {}
    for layer, of_layer in heads.items():
        of_layer.eval()
        # Counted on the device: to move each batch's counts would wait for the GPU.
        n_heads = len(of_layer.weight)
        counts[layer] = torch.zeros(n_heads, dtype=torch.int64, device=device)
    n_images = 0
    for features, labels in source.batches(indices, size, tuple(heads)):
        target = labels.to(device, non_blocking=True)[:, None]
        for layer, of_layer in heads.items():
            logits = of_layer(features[layer].to(device))
            is_right = logits.argmax(dim=2) == target
            counts[layer] += is_right.sum(dim=0)
        n_images += len(labels)
    check_finite(heads)
    on_cpu = {}
    for layer, of_layer in counts.items():
        on_cpu[layer] = of_layer.cpu()
    return on_cpu, n_images


def have_diverged(heads: LayerHeads) -> Bool[Tensor, "heads"]:
    """Returns which heads are no longer finite, on the CPU."""
    return ~heads.is_finite().cpu()
