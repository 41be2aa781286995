"""Two processes, started as by torchrun, fine-tune a classifier as one does, and count its hits."""

import runpy
from pathlib import Path

import pytest
import torch
from commands import start

SCRIPT = """
import dataclasses
import sys
from pathlib import Path

import torch

TESTS = Path(sys.argv[2])
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
from resumed import Saved  # noqa: E402
from test_transfer_semisup import READING, Broken, Splits, evaluation, scores  # noqa: E402

from relloc import ranks  # noqa: E402
from relloc.data.views import Center, RandomResized  # noqa: E402


def evaluated():
    noted = {}
    train, held_out = Broken(split="train", n=90, every=4), Broken(split="val", n=31, every=4)
    splits = Splits(train=train, held_out=held_out)
    reading = dataclasses.replace(READING, unreadable_share=0.9, note_unreadable=noted.update)
    views = {"augment": RandomResized(crop_px=96), "view": Center(short_px=100, crop_px=96)}
    run = evaluation(share=0.3, batch=8, learning_rates=[0.01, 0.005], head_multipliers=[1],
                     **views)
    weights = []

    class Recording(Saved):
        def save(self, state):
            super().save(state)
            if "training" in state:
                weights.append(self.content["training"]["network"])

    rows = list(map(str, scores(run, Recording(), splits, encode_config=reading)))
    return {"rows": rows, "weights": weights}, noted


if __name__ == "__main__":
    ranks.join(torch.device("cpu"))
    rank = ranks.rank()
    found, noted = evaluated()
    found["noted"] = sorted(ranks.union(noted))
    ranks.leave()
    torch.save(found, Path(sys.argv[1]) / f"{rank}.pt")
"""


@pytest.mark.slow
def test_two_processes_find_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "semisup_two.py"
    script.write_text(SCRIPT)
    here = str(Path(__file__).parent)
    done = start(str(script), str(tmp_path), here, folder=tmp_path, processes=2)
    assert done.wait() == 0, done.text
    monkeypatch.setattr("sys.argv", [str(script), str(tmp_path), here])
    expected, noted = runpy.run_path(str(script))["evaluated"]()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first["rows"] == second["rows"] == expected["rows"]
    assert len(expected["rows"]) == 2
    assert first["noted"] == sorted(noted)
    assert len(first["weights"]) == len(expected["weights"]) == 6
    for of_first, of_second, of_one in zip(
        first["weights"], second["weights"], expected["weights"], strict=True
    ):
        for name, value in of_one.items():
            assert torch.equal(of_first[name], of_second[name]), name
            torch.testing.assert_close(of_first[name], value, rtol=1e-4, atol=1e-5, msg=name)
