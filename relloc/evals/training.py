"""The passes over training images in which heads of all layers are trained together."""

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
# A GPU gains more by less memory traffic than twice the products cost it; a CPU does not.
_STEPS_AT_ONCE = {"cuda": 16, "cpu": 1}
_CPU = torch.device("cpu")

Heads = dict[str, LayerHeads]
Part = tuple[Int[Tensor, "_b"], bool]  # indices of a batch, and whether they are of the tenth
Waiting = tuple[dict[str, Tensor], Tensor, bool]  # normalized features, labels, and the same


def held_back(n: int, seed: int) -> Int[Tensor, "m"]:
    """The tenth of `n` training images, one at least, that chooses among heads."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed_for(Use.HELD_BACK, seed)))
    return order[: max(1, n // _HELD_BACK)]


@dataclasses.dataclass(kw_only=True)
class Trained:
    """Heads by layer after `epoch` epochs; `best` has the most hits of the first head after any epoch, where asked."""

    heads: Heads
    epoch: int = 0
    best: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """SGD on all heads at once, rates times `gamma` at the milestones; one forward of the backbone a batch.

    Heads that must not see the held-back tenth take no step on its images: where there are such
    heads, a batch is either of the tenth or of the rest, and the batches of an epoch come mixed.
    Batch norm, which has no parameters and sees no label, is of all images that any head trains on.
    `steps_at_once` changes speed and rounding alone; None is what suits the device.
    """

    layers: Sequence[str]
    sgd: Sgd
    epochs: int
    milestone_epochs: Sequence[int]
    gamma: float
    batch: int
    batch_norm: bool
    steps_at_once: int | None = None

    def fit(
        self,
        source: FeatureSource,
        context: Context,
        *,
        tenth: Int[Tensor, "m"],
        watched: FeatureSource | None,
    ) -> Trained:
        """Heads trained to the last epoch, from where it was stopped; each epoch's hits on `watched`, if any.

        Raises:
            UsageError: features that are not finite.
            DataError: a whole batch of images that can't be read; too few to train on.
        """
        device, seed = context.device, context.seed
        trained = Trained(heads={layer: self._heads(source, layer, seed, device) for layer in self.layers})
        if saved := context.state.load():
            trained.epoch, trained.best = saved["epoch"], saved["best"]
            for layer, heads in trained.heads.items():
                heads.load_state_dict(saved["heads"][layer])
        for epoch in range(trained.epoch, self.epochs):
            for heads in trained.heads.values():
                heads.train()
            if not self._pass(trained.heads, source, tenth, epoch, device, seed):
                raise DataError(
                    f"of {source.n} training images too few can be read and are not held back to choose among linear "
                    "heads: no head can be trained on them, give more"
                )
            check_finite(trained.heads)
            trained.epoch = epoch + 1
            if watched:
                hits, _ = count_hits(trained.heads, watched, torch.arange(watched.n), self.batch, device)
                trained.best = {layer: max(int(of[0]), trained.best.get(layer, 0)) for layer, of in hits.items()}
            context.state.save(
                {
                    "epoch": trained.epoch,
                    "best": trained.best,
                    "heads": {layer: heads.state_dict() for layer, heads in trained.heads.items()},
                }
            )
        return trained

    def _heads(self, source: FeatureSource, layer: str, seed: int, device: torch.device = _CPU) -> LayerHeads:
        channels = source.channels[layer] if self.batch_norm else None
        return LayerHeads(
            self.sgd,
            dim=source.dims[layer],
            channels=channels,
            n_classes=source.n_classes,
            seed=seed,
            device=device,
        )

    def _pass(
        self, heads: Heads, source: FeatureSource, tenth: Tensor, epoch: int, device: torch.device, seed: int
    ) -> int:
        """Train for an epoch; how many batches all heads have learned from."""
        factor = milestone_factor(epoch, self.milestone_epochs, self.gamma)
        waiting: list[Waiting] = []
        learned = 0
        for request in self.requests(source.n, tenth, seed_for(Use.HEAD_BATCHES, seed, epoch)):
            for features, labels, of_tenth in self._read(source, request, epoch):
                if self.batch_norm and len(labels) < 2:
                    continue  # batch norm knows no variance of one
                rows = {layer: one.normalized(features[layer].to(device)) for layer, one in heads.items()}
                waiting.append((rows, labels.to(device, non_blocking=True), of_tenth))
                learned += not of_tenth
                if len(waiting) == (self.steps_at_once or _STEPS_AT_ONCE[device.type]):
                    self._learn(heads, waiting, factor)
                    waiting = []
        if waiting:
            self._learn(heads, waiting, factor)
        return learned

    def _learn(self, heads: Heads, waiting: Sequence[Waiting], factor: float) -> None:
        active = [[one.sees_all or not of_tenth for one in self.sgd.settings] for _, _, of_tenth in waiting]
        ways = self.sgd.coefficients(np.array(active), factor)
        for layer, of_layer in heads.items():
            of_layer.learn([rows[layer] for rows, _, _ in waiting], [labels for _, labels, _ in waiting], ways)

    def requests(self, n: int, tenth: Int[Tensor, "m"], seed: int) -> list[list[Part]]:
        """What an epoch asks of its source: batches in random order, last the ones that are not full."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(n, generator=generator)
        if all(setting.sees_all for setting in self.sgd.settings):
            return [[(indices, False) for indices in order.split(self.batch)]]
        among = torch.isin(order, tenth)
        groups = (False, True) if any(setting.sees_all for setting in self.sgd.settings) else (False,)
        parts = [(indices, group) for group in groups for indices in order[among == group].split(self.batch)]
        full = [part for part in parts if len(part[0]) == self.batch]
        mixed = [full[number] for number in torch.randperm(len(full), generator=generator).tolist()]
        rest = [[part] for part in parts if 0 < len(part[0]) < self.batch]
        return [request for request in (mixed, *rest) if request]

    def _read(
        self, source: FeatureSource, request: list[Part], epoch: int
    ) -> Iterator[tuple[Features, Int[Tensor, "_b"], bool]]:
        """Features, labels and group of each batch; images that can't be read are missing in them."""
        indices = torch.cat([indices for indices, _ in request])
        groups = [of_tenth for _, of_tenth in request]
        read = 0
        for features, labels in source.batches(indices, self.batch, self.layers, epoch, self.epochs):
            yield features, labels, groups[read]
            read += 1
        if read < len(request) and len(set(groups)) > 1:
            raise DataError(
                f"none of a whole batch of {self.batch} images can be read, so that images which choose among "
                "linear heads could not be told from the others: mend or remove what can't be read"
            )


def check_finite(heads: Heads) -> None:
    """Raises `UsageError` if features that heads were given were not finite."""
    bad = [layer for layer, of_layer in heads.items() if not of_layer.features_are_finite]
    if bad:
        raise UsageError(
            f"features of {', '.join(bad)} are NaN or infinite, so no linear classifier can be trained on them: the "
            "checkpoint is damaged or its numbers overflow. Name other layers, or try precision=fp32"
        )


@torch.no_grad()
def count_hits(
    heads: Heads, source: FeatureSource, indices: Int[Tensor, "m"], size: int, device: torch.device
) -> tuple[dict[str, Int[Tensor, "heads"]], int]:
    """Right answers of each head by layer, and how many images were asked. Leaves heads in eval mode.

    Raises:
        UsageError: features that are not finite.
    """
    for of_layer in heads.values():
        of_layer.eval()
    counts = {layer: torch.zeros(len(one.weight), dtype=torch.int64, device=device) for layer, one in heads.items()}
    seen = 0
    for features, labels in source.batches(indices, size, tuple(heads)):
        target = labels.to(device, non_blocking=True)[:, None]
        for layer, of_layer in heads.items():
            counts[layer] += (of_layer(features[layer].to(device)).argmax(dim=2) == target).sum(dim=0)
        seen += len(labels)
    check_finite(heads)
    return {layer: of_layer.cpu() for layer, of_layer in counts.items()}, seen


def have_diverged(heads: LayerHeads) -> Bool[Tensor, "heads"]:
    """Which heads are no longer finite, on the CPU."""
    return ~heads.finite().cpu()
