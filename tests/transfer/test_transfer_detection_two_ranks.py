"""Two processes, told what torchrun tells them, train and test a detector as one does."""

import runpy
from pathlib import Path

import pytest
import torch
from commands import start

pytestmark = pytest.mark.slow

SCRIPT = f"""
import sys
from pathlib import Path

sys.path[:0] = {[str(Path(__file__).parents[1]), str(Path(__file__).parent)]}
import torch
from resumed import Saved
from test_transfer_voc0712_detection import Rectangles, evaluation, given

from relloc import ranks


def trained(folder):
    state = Saved()
    one = evaluation(
        iterations=3, batch=8, images_per_gpu=2, milestones=[2], evaluate_every=3, warmup=1
    )
    # Images of one size: others are padded to the largest of a forward, which batch norm sees.
    train = Rectangles(n=12, portraits=False)
    scores = list(one.run(given(folder, train=train, state=state)))
    weights = state.content["network"]
    return weights, [(score.metric, score.value) for score in scores]


if __name__ == "__main__":
    ranks.join(torch.device("cpu"))
    folder = Path(sys.argv[1])
    torch.save(trained(folder), folder / f"rank{{ranks.rank()}}.pt")
    ranks.leave()
"""


def test_two_processes_with_synchronized_batch_norm_are_one(tmp_path: Path) -> None:
    script = tmp_path / "detect_two.py"
    script.write_text(SCRIPT)
    done = start(str(script), str(tmp_path), folder=tmp_path, processes=2)
    assert done.wait() == 0, done.text
    of_ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]
    expected, scores = runpy.run_path(str(script))["trained"](tmp_path / "alone")
    assert len(expected) > 60
    for name, value in expected.items():
        assert torch.equal(of_ranks[0][0][name], of_ranks[1][0][name]), name
        torch.testing.assert_close(of_ranks[0][0][name], value, rtol=1e-3, atol=1e-5, msg=name)
    assert of_ranks[0][1] == of_ranks[1][1]
    # Scores of untrained detections are close to each other, so that their order may change.
    assert of_ranks[0][1] == [(metric, pytest.approx(value, abs=0.5)) for metric, value in scores]
