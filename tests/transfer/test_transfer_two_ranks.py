"""Two processes, told what torchrun tells them, fine-tune as one does."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import start
from torch import Tensor

pytestmark = pytest.mark.slow

SCRIPT = """
import dataclasses
import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from relloc import ranks
from relloc.models.small import SmallBackbone
from relloc.transfer.loop import FineTuning, MicroBatch, split_for_rank
from relloc.transfer.schedule import Milestones

CPU = torch.device("cpu")
BATCH, STEPS = 6, 6


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = SmallBackbone(widths=(8, 8, 8, 10, 8))
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(8, momentum=None)
        self.head = nn.Linear(8, 3)

    def forward(self, images, dropout):
        pooled = self.norm(self.backbone(images)["feature5"].mean((2, 3)))
        return self.head(self.drop(pooled) if dropout else pooled)


def sample(step, number):
    generator = torch.Generator().manual_seed(100 * step + number)
    return torch.randn(3, 64, 64, dtype=torch.float64, generator=generator), (step + number) % 3


def task(way, accumulation):
    torch.manual_seed(ranks.rank())  # the first one's weights are everybody's
    network = Network().double()

    def parts(first, end):
        for step in range(first, end):
            numbers = split_for_rank(range(BATCH), accumulation)
            if step == 1:  # half of them can't be read, which are all of the second process
                numbers = [[number for number in part if number < BATCH // 2] for part in numbers]
            micro_batches = []
            for part in numbers:
                content = [sample(step, number) for number in part]
                micro_batches.append(MicroBatch(content=content, samples=len(part)))
            yield micro_batches

    def loss(part):
        no_images = torch.zeros(0, 3, 64, 64).double()
        images = torch.stack([image for image, _ in part]) if part else no_images
        targets = torch.tensor([target for _, target in part], dtype=torch.int64)
        return cross_entropy(network(images, way == "plain"), targets)

    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    return FineTuning(
        network, optimizer, micro_batches=parts, loss=loss, length=STEPS // 2, steps_per_unit=2,
        schedule=Milestones(milestones=[2], gamma=0.1, warmup=1, warmup_from=0.1),
        synchronized=way == "synchronized", seed=1, device=CPU, bf16=False, name="test",
    )


def trained(way, accumulation):
    training = task(way, accumulation)
    spans = []
    for number, span in enumerate(training.reports(1)):
        spans.append(dataclasses.asdict(span))
        if number == 0 and ranks.world_size() > 1:
            stopped = Path(sys.argv[1]) / f"stopped_{way}_{ranks.rank()}.pt"
            torch.save(training.state_dict(), stopped)
    return training.network.state_dict(), spans


def resumed(way, accumulation):
    training = task(way, accumulation)
    training.load_state_dict(torch.load(Path(sys.argv[1]) / f"stopped_{way}_0.pt"))
    for span in training.reports(1):
        pass
    return training.network.state_dict()


if __name__ == "__main__":
    ranks.join(CPU)
    folder = Path(sys.argv[1])
    for way in ("plain", "synchronized"):
        state, spans = trained(way, 1)
        ranks.total(torch.zeros(1))  # the first one has saved
        again = resumed(way, 1)
        torch.save([state, again], folder / f"{way}_{ranks.rank()}.pt")
        (folder / f"{way}_{ranks.rank()}.json").write_text(json.dumps(spans))
    ranks.leave()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two_ranks")
    script = folder / "fine_tune_two.py"
    script.write_text(SCRIPT)
    done = start(str(script), str(folder), folder=folder, processes=2)
    assert done.wait() == 0, done.text
    return folder


def of_ranks(folder: Path, way: str) -> tuple[list[list[dict[str, Tensor]]], list[Any]]:
    states = [torch.load(folder / f"{way}_{rank}.pt") for rank in (0, 1)]
    return states, [json.loads((folder / f"{way}_{rank}.json").read_text()) for rank in (0, 1)]


# With plain batch norm two processes compute what one computes in two parts; synchronized, what
# one computes at once.
@pytest.mark.parametrize(("way", "accumulation"), [("plain", 2), ("synchronized", 1)])
def test_two_processes_are_one(folder: Path, way: str, accumulation: int) -> None:
    expected, reports = runpy.run_path(str(folder / "fine_tune_two.py"))["trained"](
        way, accumulation
    )
    states, reported = of_ranks(folder, way)
    assert reported[0] == reported[1] == [pytest.approx(span, rel=1e-9) for span in reports]
    assert len(expected) > 60
    for name, value in expected.items():
        assert torch.equal(states[0][0][name], states[1][0][name]), name
        # Statistics of plain batch norm are the first process's own; one process saw both parts.
        if way == "synchronized" or name.endswith(("weight", "bias")):
            torch.testing.assert_close(states[0][0][name], value, rtol=1e-6, atol=1e-10, msg=name)


@pytest.mark.parametrize("way", ["plain", "synchronized"])
def test_two_processes_go_on_with_the_same_bits(folder: Path, way: str) -> None:
    for never_stopped, again in of_ranks(folder, way)[0]:
        for name, value in never_stopped.items():
            assert torch.equal(value, again[name]), name
