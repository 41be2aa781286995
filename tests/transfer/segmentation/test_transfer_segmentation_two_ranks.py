"""Two processes, told what torchrun tells them, train the segmentation network as one does."""

import runpy
from pathlib import Path

import pytest
import torch
from commands import start

pytestmark = pytest.mark.slow

SCRIPT = """
import sys
from pathlib import Path

import numpy as np
import torch

from relloc import ranks
from relloc.models.small import SmallBackbone
from relloc.transfer.loop import FineTuning, MicroBatch, split_for_rank
from relloc.transfer.schedule import Poly
from relloc.transfer.segmentation.fcn import FullyConvolutionalNetwork
from relloc.transfer.segmentation.transforms import TrainingCrops

CPU = torch.device("cpu")
VIEW = TrainingCrops(box=(96, 64), crop_px=64)
STEPS = 2


def sample(step, number):
    rng = np.random.default_rng(10 * step + number)
    image = rng.integers(0, 256, (64, 80, 3), dtype=np.uint8)
    blocks = rng.integers(0, 3, (8, 10), dtype=np.uint8)
    classes = np.kron(blocks, np.ones((8, 8), dtype=np.uint8))
    return VIEW.sample(image, classes, seed=10 * step + number)


def trained():
    torch.manual_seed(ranks.rank())  # the weights of the first process are everybody's
    backbone = SmallBackbone(widths=(8, 8, 8, 10, 8))
    network = FullyConvolutionalNetwork(backbone, 3, align_corners=False, dropout=0.5, seed=0)

    def micro_batches(first, end):
        for step in range(first, end):
            numbers = list(split_for_rank(range(4))[0])
            if step == 1:  # all that the second process should read can't be read
                numbers = [number for number in numbers if number < 2]
            samples = [sample(step, number) for number in numbers]
            yield [MicroBatch(content=VIEW.batch(samples, CPU), samples=len(samples))]

    def loss(batch):
        return torch.stack(list(network.losses(batch).values())).sum()

    training = FineTuning(
        network,
        torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4),
        micro_batches=micro_batches,
        loss=loss,
        length=STEPS,
        steps_per_unit=1,
        schedule=Poly(length=STEPS, power=0.9),
        synchronized=True,
        seed=0,
        device=CPU,
        bf16=False,
        name="segmentation",
    )
    for _ in training.reports(STEPS):
        pass
    return network.state_dict()


if __name__ == "__main__":
    ranks.join(CPU)
    torch.save(trained(), Path(sys.argv[1]) / f"state_{ranks.rank()}.pt")
    ranks.leave()
"""


def test_two_processes_with_synchronized_batch_norm_are_one(tmp_path: Path) -> None:
    script = tmp_path / "segment_two.py"
    script.write_text(SCRIPT)
    done = start(str(script), str(tmp_path), folder=tmp_path, processes=2)
    assert done.wait() == 0, done.text
    expected = runpy.run_path(str(script))["trained"]()
    first, second = (torch.load(tmp_path / f"state_{rank}.pt") for rank in (0, 1))
    assert any(name.startswith("auxiliary_head") for name in expected)
    for name, value in expected.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5, msg=name)
