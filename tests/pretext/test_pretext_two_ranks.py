"""Two processes started by torchrun train as one does that accumulates gradients."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from commands import start
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

SCRIPT = """
import dataclasses
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from relloc import ranks
from relloc.geometry import PatchGrid
from relloc.models.pair_head import PairHead
from relloc.models.small import SmallBackbone
from relloc.patches.color import Drop
from relloc.patches.curriculum import TrainingPatches
from relloc.patches.normalize import ByDataset
from relloc.patches.pipeline import PatchPipeline
from relloc.pretext.loop import Task, train
from relloc.pretext.relative_location import RelativeLocation
from relloc.pretext.optimizer import sgd
from relloc.pretext.schedule import Step
from relloc.seeds import Use, seed_for

STEPS, FORWARDS = 4, 4


def images(forward):
    generator = torch.Generator().manual_seed(forward)
    return torch.randint(256, (3, 3, 106, 106), dtype=torch.uint8, generator=generator)


def trained(rank, world):
    torch.manual_seed(0)
    head = PairHead(embedding_dim=8, hidden_dim=16, batch_norm_momentum=0.1, dropout=0.5,
                    neck_std=0.3, head_std=0.3)
    model = RelativeLocation(SmallBackbone(widths=(8, 8, 8, 10, 8)), head, batch_norm="separate",
                             images_per_batch_norm=3).double()
    pipeline = PatchPipeline(
        grid=PatchGrid(patch_px=32, gap_px=2, jitter_px=3, resize=None),
        color=Drop(noise="uniform"),
        normalize=ByDataset(),
    )
    task = Task(
        model=model,
        network=model,
        optimizer=sgd(model, lr=0.1, lr_images_per_step=12, images_per_step=12, momentum=0.9,
                      weight_decay=1e-4, head_weight_decay=5e-4),
        schedule=Step(epochs=2, warmup_epochs=1, warmup_from=0.1, milestone_epochs=[], gamma=0.1),
        draw=TrainingPatches(patches=pipeline).draw,
        make=lambda *given: pipeline.make(*given).double(),
        steps_per_epoch=STEPS // 2,
        accumulation=FORWARDS // world,
        seed_of=lambda step, forward: seed_for(Use.PATCHES, 5, step, forward),
        device=torch.device("cpu"),
        bf16=False,
    )
    reports = []
    train(
        task,
        (images(step * FORWARDS + rank * task.accumulation + number)
         for step in range(STEPS) for number in range(task.accumulation)),
        done=task.start(),
        report_every=2,
        report=lambda progress: reports.append(dataclasses.asdict(progress)),
        after_step=lambda done: False,
    )
    return model.state_dict(), reports


if __name__ == "__main__":
    ranks.join(torch.device("cpu"))
    rank = ranks.rank()
    state, reports = trained(rank, ranks.world_size())
    ranks.leave()
    folder = Path(sys.argv[1])
    save_file(state, folder / f"{rank}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps(reports))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two_ranks")
    script = folder / "train_two.py"
    script.write_text(SCRIPT)
    done = start(str(script), str(folder), folder=folder, processes=2)
    assert done.wait() == 0, done.text
    return folder


def test_two_processes_give_the_weights_of_one_that_accumulates(folder: Path) -> None:
    state, reports = runpy.run_path(str(folder / "train_two.py"))["trained"](0, 1)
    of_ranks = [load_file(folder / f"{rank}.safetensors") for rank in (0, 1)]
    weights = [name for name in state if name.endswith(("weight", "bias"))]
    assert len(weights) > 20
    for name in weights:
        assert torch.equal(of_ranks[0][name], of_ranks[1][name]), name
        torch.testing.assert_close(of_ranks[0][name], state[name], rtol=1e-6, atol=1e-9, msg=name)
    reports_of_ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert reports_of_ranks[0] == reports_of_ranks[1]
    assert reports_of_ranks[0] == [pytest.approx(report, rel=1e-9) for report in reports]


def test_batch_norm_of_each_process_sees_its_own_forwards_alone(folder: Path) -> None:
    # Four steps of two forwards, of two groups (neighbors, centers) each.
    of_first = load_file(folder / "0.safetensors")
    assert of_first["backbone.stem.1.num_batches_tracked"] == 4 * 2 * 2
    assert of_first["head.neck.1.num_batches_tracked"] == 4 * 2
