"""Two processes, told what torchrun tells them, train detectors as one does."""

import runpy
from pathlib import Path

import pytest
import torch
from commands import start

pytestmark = pytest.mark.slow

SCRIPT = """
import sys
from pathlib import Path

import torch

from relloc import ranks
from relloc.models.small import SmallBackbone
from relloc.transfer.detection.batch import DetectionBatch, Targets, pad_images
from relloc.transfer.detection.faster_rcnn_c4 import C4Settings, FasterRCNNC4
from relloc.transfer.detection.mask_rcnn import MaskRCNNFPN, MaskRcnnSettings
from relloc.transfer.detection.proposals import ProposalCounts
from relloc.transfer.detection.regions import RegionTraining
from relloc.transfer.loop import FineTuning, MicroBatch, split_for_rank
from relloc.transfer.schedule import Milestones

CPU = torch.device("cpu")
STEPS = 2
LITTLE = {
    "training_proposals": ProposalCounts(before_nms=100, after_nms=40),
    "regions": RegionTraining(regions_per_image=16),
}


def detector(kind):
    backbone = SmallBackbone(widths=(8, 8, 8, 10, 8))
    if kind == "faster_rcnn_c4":
        return FasterRCNNC4(backbone, 3, C4Settings(**LITTLE), seed=0)
    settings = MaskRcnnSettings(channels=8, hidden=16, **LITTLE)
    return MaskRCNNFPN(backbone, 3, settings, seed=0)


def batch_of(step, numbers):
    images, sizes, objects = [], [], []
    for number in numbers:
        generator = torch.Generator().manual_seed(100 * step + number)
        size = (96, 128) if number < 2 else (128, 96)
        corner = torch.randint(4, 30, (number, 2), generator=generator)
        sides = torch.randint(20, 60, (number, 2), generator=generator)
        masks = torch.zeros(number, *size, dtype=torch.uint8)
        for mask, (x, y), (width, height) in zip(masks, corner.tolist(), sides.tolist()):
            mask[y : y + height, x : x + width] = 1
        objects.append(
            Targets(
                boxes=torch.cat([corner, corner + sides], dim=1).float(),
                classes=torch.randint(3, (number,), generator=generator),
                masks=masks,
            )
        )
        images.append(torch.randn(3, *size, generator=generator))
        sizes.append(size)
    padded = pad_images(images)
    # As far as a batch of all images is padded, since padding reaches into convolutions.
    whole = torch.zeros(len(images), 3, 128, 128)
    whole[:, :, : padded.shape[2], : padded.shape[3]] = padded
    seeds = [100 * step + number for number in numbers]
    groups = [number // 2 for number in numbers]
    return DetectionBatch(
        images=whole, sizes=sizes, targets=objects, groups=groups, seeds=seeds
    )


def trained(kind):
    torch.manual_seed(ranks.rank())  # the weights of the first process are everybody's
    network = detector(kind)

    def micro_batches(first, end):
        for step in range(first, end):
            numbers = list(split_for_rank(range(4))[0])
            # All that the second process should read can't be read.
            if step == 1:
                numbers = [number for number in numbers if number < 2]
            yield [MicroBatch(content=batch_of(step, numbers), samples=len(numbers))]

    def loss(batch):
        return torch.stack(list(network.losses(batch).values())).sum()

    training = FineTuning(
        network,
        torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4),
        micro_batches=micro_batches,
        loss=loss,
        length=STEPS,
        steps_per_unit=1,
        schedule=Milestones(milestones=[], gamma=1),
        synchronized=True,
        seed=0,
        device=CPU,
        bf16=False,
        name="detection",
    )
    for _ in training.reports(STEPS):
        pass
    return network.state_dict()


if __name__ == "__main__":
    ranks.join(CPU)
    torch.save(trained(sys.argv[2]), Path(sys.argv[1]) / f"state_{ranks.rank()}.pt")
    ranks.leave()
"""


@pytest.mark.parametrize("kind", ["faster_rcnn_c4", "mask_rcnn"])
def test_two_processes_with_synchronized_batch_norm_are_one(kind: str, tmp_path: Path) -> None:
    script = tmp_path / "detect_two.py"
    script.write_text(SCRIPT)
    done = start(str(script), str(tmp_path), kind, folder=tmp_path, processes=2)
    assert done.wait() == 0, done.text
    expected = runpy.run_path(str(script))["trained"](kind)
    first, second = (torch.load(tmp_path / f"state_{rank}.pt") for rank in (0, 1))
    assert any(name.startswith("rpn") for name in expected)
    for name, value in expected.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5, msg=name)
        if value.is_floating_point():
            assert torch.isfinite(value).all(), name
