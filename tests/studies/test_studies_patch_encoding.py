"""Features of patches of images of any size, beside a plain twin."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from made_patches import encode_config, encoded, joined, made_images, plain_patch, small_backbone

from relloc.data.folder import FolderImages
from relloc.errors import DataError, UsageError
from relloc.models.alexnet import AlexNetBackbone
from relloc.models.small import SmallBackbone
from relloc.patches.normalize import ByDataset
from relloc.studies.patch_encoding import (
    PATCH_LAYERS,
    PatchEncoder,
    check_patch_settings,
    encode_patches,
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> FolderImages:
    return made_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def backbone() -> SmallBackbone:
    return small_backbone()


@pytest.mark.parametrize("network", ["small", "alexnet"])
def test_features_are_those_of_each_patch_by_itself(
    backbone: SmallBackbone, images: FolderImages, network: str
) -> None:
    used = AlexNetBackbone().eval() if network == "alexnet" else backbone
    found = encoded(used, images)
    assert [len(batch.images) for batch in found] == [4, 4, 4]
    indices = np.concatenate([batch.images for batch in found])
    # The third image is smaller than all boxes.
    assert indices.tolist() == [0, 0, 0, 1, 1, 1, 3, 3, 3, 4, 4, 4]
    boxes = np.concatenate([batch.boxes for batch in found])
    for number, (index, box) in enumerate(zip(indices.tolist(), boxes.tolist(), strict=True)):
        patch = plain_patch(images.read(index), box, 32)
        with torch.no_grad():
            normalized = ByDataset()(patch[None])
            maps = used(normalized)
            embedding = used.embed(normalized)
        of_patch = {layer: joined(found, layer)[number] for layer in PATCH_LAYERS}
        torch.testing.assert_close(of_patch["embedding"], embedding[0], atol=1e-4, rtol=1e-3)
        for stage, stage_map in maps.items():
            mean = stage_map[0].mean(dim=(1, 2))
            torch.testing.assert_close(of_patch[stage], mean, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("batch", "workers"), [(1, 0), (5, 1), (100, 2)])
def test_batches_and_workers_change_nothing(
    backbone: SmallBackbone, images: FolderImages, batch: int, workers: int
) -> None:
    usual = encoded(backbone, images)
    other = encoded(backbone, images, batch=batch, workers=workers)
    assert max(len(each.images) for each in other) <= batch
    for name in ("images", "boxes"):
        expected = np.concatenate([getattr(each, name) for each in usual])
        found = np.concatenate([getattr(each, name) for each in other])
        assert expected.tolist() == found.tolist()
    for layer in PATCH_LAYERS:
        torch.testing.assert_close(joined(other, layer), joined(usual, layer), atol=1e-5, rtol=1e-4)


def test_an_image_that_cannot_be_read_is_left_out_and_named(
    backbone: SmallBackbone, images: FolderImages, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(images.paths[1]).read_bytes()[:300])
    paths = [images.paths[0], str(broken), *images.paths[2:]]
    with_broken = FolderImages(name="made", split="train", paths=paths, labels=[], classes=())
    found = encoded(backbone, with_broken, unreadable_share=0.5)
    assert set(np.concatenate([each.images for each in found])) == {0, 3, 4}
    with pytest.raises(DataError, match=r"broken\.png"):
        encoded(backbone, with_broken)


@dataclasses.dataclass(frozen=True)
class WrongBoxes:
    box: tuple[int, ...]
    n: int = 1
    most: int = 2

    def __call__(self, height: int, width: int, seed: int) -> np.ndarray:
        return np.array([self.box] * self.n)


@pytest.mark.parametrize(
    "boxes",
    [
        *(WrongBoxes((-1, 0, 5, 5)), WrongBoxes((0, 0, 91, 5)), WrongBoxes((0, 0, 5, 71))),
        *(WrongBoxes((5, 0, 5, 5)), WrongBoxes((0, 0, 5, 5), n=3)),
    ],
)
def test_wrong_boxes_are_refused(
    backbone: SmallBackbone, images: FolderImages, boxes: WrongBoxes
) -> None:
    encoder = PatchEncoder(
        backbone=backbone,
        layers=("embedding",),
        patch_px=32,
        batch=4,
        config=encode_config(),
    )
    found = encode_patches(encoder, images, [(0, 0)], boxes, what="patches")
    with pytest.raises(ValueError, match="box"):
        list(found)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"layers": ["avgpool"]}, r"study\.made\.layers is .*avgpool"),
        ({"layers": []}, r"study\.made\.layers is "),
        ({"patch_px": 0}, r"study\.made\.patch_px is 0"),
        ({"batch": 2.5}, r"study\.made\.batch is 2.5"),
    ],
)
def test_wrong_settings_are_told_by_name(wrong: dict[str, object], message: str) -> None:
    right = {"layers": ["embedding"], "patch_px": 96, "batch": 256}
    check_patch_settings("study.made", **right)
    with pytest.raises(UsageError, match=message):
        check_patch_settings("study.made", **{**right, **wrong})
