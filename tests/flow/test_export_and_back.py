"""Out to another project, and back in: the commands of a user."""

import torch
from tiny import TINY

from relloc.checkpoints.backbone_files import BACKBONE_FILE, save_backbone
from relloc.models.resnet import ResNetBackbone
from relloc.results import read_results

LOOK = tuple(word for word in TINY if word.startswith(("view.", "data.source")))


def test_an_exported_file_is_evaluated_by_its_path_alone(relloc, tmp_path):
    torch.manual_seed(1)
    save_backbone(
        tmp_path / BACKBONE_FILE, ResNetBackbone(depth=18), {"model": {"name": "resnet18"}}
    )
    exported = relloc("export", BACKBONE_FILE, "--layout", "detectron2", "--out", "r18.pkl")
    assert exported.code == 0, exported.text
    assert f'WEIGHTS: "{tmp_path / "r18.pkl"}"' in exported.text
    out = tmp_path / "e"
    line = ("checkpoint=r18.pkl", "eval=[knn]", *LOOK, "tracking=none", f"hydra.run.dir={out}")
    done = relloc("evaluate", *line)
    assert done.code == 0, done.text
    assert {(row.checkpoint, row.model) for row in read_results(out)} == {
        (str(tmp_path / "r18.pkl"), "resnet18")
    }
