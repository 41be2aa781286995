"""Tests an evaluation shared by two processes that is stopped and resumed."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from commands import start

SCRIPT = """
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from relloc import ranks
from relloc.data.folder import FolderImages
from relloc.data.image_set import Splits
from relloc.evaluation.contract import EvalSettings, EvaluatedModel, Evaluation, NamedEvaluation
from relloc.features.source import EncodeConfig
from relloc.models.small import SmallBackbone
from relloc.pretext.stopping import stop_request
from relloc.results import Score, read_results
from relloc.runs.measuring import evaluate_model
from relloc.runs.folder import RunFolder
from relloc.runs.reusing import EvalRun

CPU = torch.device("cpu")
run_dir, stopping_rank, told = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
epochs = []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Walk(Evaluation):
    '''Each process walks by itself; after an epoch one sees where the others are.'''

    kind = "study"
    labels = "none"
    version = 1
    across_ranks = True
    layers = ()

    epochs: int
    view: str = "nothing is seen"

    def run(self, context):
        saved = context.state.load() or {"epoch": 0, "places": torch.zeros(ranks.world_size(), 5)}
        mine, other = saved["places"][ranks.rank()], saved["places"].sum(0)
        for epoch in range(saved["epoch"], self.epochs):
            generator = torch.Generator().manual_seed(10 * epoch + ranks.rank())
            mine = torch.sin(3 * mine + torch.randn(5, generator=generator) + 0.1 * other)
            places = ranks.gathered(mine)
            other = places.sum(0)
            epochs.append(epoch)
            if epoch == 2 and ranks.rank() == stopping_rank:
                os.kill(os.getpid(), signal.SIGUSR1)  # this process alone
            context.state.save({"epoch": epoch + 1, "places": places})
        for number, value in enumerate(places.flatten().tolist()):
            yield Score(metric=f"place{number}", unit="", higher_is_better=None, value=value, n=1)


if __name__ == "__main__":
    ranks.join(CPU)
    none = FolderImages(name="none", split="train", paths=[__file__])
    torch.manual_seed(0)
    model = EvaluatedModel(
        backbone=SmallBackbone(widths=(8, 8, 8, 8, 8)),
        checkpoint="/one/backbone",
        model="small",
        weights="w",
    )
    splits = Splits(train=none, held_out=none)
    named = NamedEvaluation(name="walk", evaluation=Walk(epochs=6), splits=splits)
    encode_config = EncodeConfig(
        batch=4, workers=0, device=CPU, precision="fp32", unreadable_share=0.0
    )
    settings = EvalSettings(
        encode_config=encode_config,
        batch_norms=["as_trained"],
        calibration_images=4,
        bank_gib=1.0,
        seed=3,
    )
    with stop_request() as stop:
        folder = RunFolder(run_dir, None) if ranks.rank() == 0 else None
        run = EvalRun(
            run_dir=run_dir, folder=folder, stop=stop, save_every_s=3600, reused_runs=None
        )
        try:
            evaluate_model(model, [named], settings, run)
        finally:
            (told / f"{ranks.rank()}.json").write_text(json.dumps(epochs))
    ranks.leave()
"""


def rows(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("stopping_rank", [0, 1])
def test_a_stop_of_any_process_is_gone_on_from_by_all_with_the_same_bits(
    tmp_path: Path, stopping_rank: int
) -> None:
    script = tmp_path / "walk_two.py"
    script.write_text(SCRIPT)
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()

    def walk(name: str, stopping_rank: int) -> tuple[set[int | None], list[list[int]]]:
        """The exit codes, and the epochs that each process did."""
        arguments = (str(tmp_path / name), str(stopping_rank), str(tmp_path))
        command = start(str(script), *arguments, folder=tmp_path, processes=2)
        command.wait()
        codes = {process.exitcode for process in command.processes}
        return codes, [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]

    never = -1
    assert walk("whole", never) == ({0}, [[0, 1, 2, 3, 4, 5]] * 2)
    assert walk("stopped", stopping_rank) == ({128 + signal.SIGUSR1}, [[0, 1, 2]] * 2)
    assert rows(tmp_path / "stopped") == []
    assert walk("stopped", never) == ({0}, [[3, 4, 5]] * 2)
    assert len(rows(tmp_path / "whole")) == 10
    assert rows(tmp_path / "stopped") == rows(tmp_path / "whole")
