"""The network, its crops, the loop and the test together."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from relloc.data.annotations import VOID
from relloc.models.small import SmallBackbone
from relloc.transfer.loop import FineTuning, MicroBatch, split_for_rank
from relloc.transfer.schedule import Milestones, Poly
from relloc.transfer.segmentation.batch import SegmentationBatch
from relloc.transfer.segmentation.fcn import FullyConvolutionalNetwork
from relloc.transfer.segmentation.inference import WholeImage
from relloc.transfer.segmentation.transforms import (
    CropSample,
    TrainingCrops,
)

CPU = torch.device("cpu")
N_CLASSES = 3
N_STEPS = 80


def network() -> FullyConvolutionalNetwork:
    torch.manual_seed(0)
    backbone = SmallBackbone(widths=(16, 16, 32, 32, 64))
    return FullyConvolutionalNetwork(backbone, N_CLASSES, align_corners=False, seed=0)


def two_images(side: int = 128) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images of a bright and a striped square on gray noise, with a frame of void."""
    rng = np.random.default_rng(0)
    images = []
    for top in (0, side // 2):
        image = rng.integers(90, 130, (side, side, 3), dtype=np.uint8)
        classes = np.zeros((side, side), dtype=np.uint8)
        half = side // 2
        image[top : top + half, :half] = (230, 60, 40)
        classes[top : top + half, :half] = 1
        image[half - top : side - top, half::4] = 255
        image[half - top : side - top, half + 1 :: 4] = 0
        classes[half - top : side - top, half:] = 2
        classes[:3] = VOID
        images.append((image, classes))
    return images


def trained(
    net: FullyConvolutionalNetwork,
    view: TrainingCrops,
    samples_of: Callable[[int], list[CropSample]],
    **changes: Any,
) -> list[float]:
    """Trains the network, and returns the mean losses of ten spans."""
    accumulation = changes.pop("accumulation", 1)
    frozen = changes.pop("frozen", False)

    def loss(batch: SegmentationBatch) -> Tensor:
        if frozen:  # batch norm as it is
            for module in net.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return sum(net.losses(batch).values(), torch.zeros(()))

    def micro_batches(first: int, end: int) -> Iterator[Sequence[MicroBatch[SegmentationBatch]]]:
        for step in range(first, end):
            parts = split_for_rank(samples_of(step), accumulation)
            yield [MicroBatch(content=view.batch(part, CPU), samples=len(part)) for part in parts]

    settings: dict[str, Any] = {
        "schedule": Milestones(milestones=[], gamma=1),
        "length": 1,
        **changes,
    }
    training = FineTuning(
        net,
        torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4),
        micro_batches=micro_batches,
        loss=loss,
        steps_per_unit=1,
        synchronized=False,
        seed=0,
        device=CPU,
        bf16=False,
        name="segmentation",
        **settings,
    )
    every = max(1, settings["length"] // 10)
    return [report.loss for report in training.reports(every)]


def test_rates_fall_from_a_hundredth_to_the_floor_of_mmsegmentation() -> None:
    schedule = Poly(length=20_000, power=0.9, floor=0.0001 / 0.01)
    for step, rate in ((0, 0.01), (10_000, 0.0054053), (19_999, 0.00010133)):
        by_hand = (0.01 - 1e-4) * (1 - step / 20_000) ** 0.9 + 1e-4
        assert 0.01 * schedule.factor(step) == pytest.approx(by_hand, rel=1e-9)
        assert by_hand == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize("accumulation", [2, 3, 5])
def test_a_step_accumulated_in_parts_is_that_of_the_whole_batch(accumulation: int) -> None:
    view = TrainingCrops(box=(128, 64), crop_px=64)
    pairs = two_images()

    def samples_of(step: int) -> list[CropSample]:
        return [view.sample(*pairs[number % 2], seed=number) for number in range(5)]

    states = []
    for parts in (1, accumulation):
        net = network()
        trained(net, view, samples_of, accumulation=parts, frozen=True)
        states.append(net.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert not torch.equal(states[0]["head.classifier.weight"], network().head.classifier.weight)


def test_a_small_network_learns_two_images() -> None:
    view = TrainingCrops(box=(128, 128), ratio=(0.95, 1.05), crop_px=128)
    pairs = two_images()

    def samples_of(step: int) -> list[CropSample]:
        return [view.sample(*pairs[number % 2], seed=4 * step + number) for number in range(4)]

    net = network()
    losses = trained(
        net, view, samples_of, length=N_STEPS, schedule=Poly(length=N_STEPS, power=0.9)
    )
    assert losses[-1] < 0.5 * losses[0]
    net.eval()
    test = WholeImage(box=(128, 128))
    confusion = np.zeros((N_CLASSES, N_CLASSES))
    for image, classes in pairs:
        found = test.class_map(net, torch.from_numpy(image)).numpy()
        seen = classes != VOID
        np.add.at(confusion, (classes[seen], found[seen]), 1)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - confusion.diagonal()
    assert (confusion.diagonal() / union).mean() > 0.85
