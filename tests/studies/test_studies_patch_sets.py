"""Patches of images of any size: what is cut, resized, encoded and kept, beside plain twins."""

import copy
import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from mixed_folder import picture
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from relloc.data.folder import FolderImages
from relloc.errors import DataError, UsageError
from relloc.features.source import EncodeConfig
from relloc.models.alexnet import AlexNetBackbone
from relloc.models.small import SmallBackbone
from relloc.patches.normalize import ByDataset
from relloc.studies.patch_sets import (
    PATCH_LAYERS,
    EncodedPatches,
    PatchSet,
    RandomPatch,
    RandomSquares,
    _cut_together,
    check_patch_settings,
    collect_patches,
    cut_resized,
    encode_patches,
    flat_images,
    patch_keys,
    unit_vectors,
)

CPU = torch.device("cpu")
SIZES = ((70, 90), (64, 200), (20, 30), (123, 77), (90, 64))  # height, width; the third is small
BOXES = RandomSquares(n=3, sides_px=(24, 40, 64))


def config(workers: int = 0, unreadable_share: float = 0.0) -> EncodeConfig:
    return EncodeConfig(
        batch=16,
        workers=workers,
        device=CPU,
        precision="fp32",
        unreadable_share=unreadable_share,
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> FolderImages:
    folder = tmp_path_factory.mktemp("images")
    paths = []
    for number, (height, width) in enumerate(SIZES):
        paths.append(str(folder / f"{number}.png"))
        picture(height, width, seed=number).save(paths[-1])
    return FolderImages(name="made", split="train", paths=paths, labels=[], classes=())


@pytest.fixture(scope="module")
def backbone() -> SmallBackbone:
    torch.manual_seed(0)
    return SmallBackbone(widths=(8, 8, 8, 10, 12)).eval()


def encoded(
    backbone: SmallBackbone | AlexNetBackbone,
    images: FolderImages,
    *,
    batch: int = 4,
    workers: int = 0,
    layers: Sequence[str] = PATCH_LAYERS,
    unreadable_share: float = 0.0,
) -> list[EncodedPatches]:
    found = encode_patches(
        backbone,
        images,
        patch_keys(range(len(images)), seed=7),
        BOXES,
        layers=layers,
        patch_px=32,
        batch=batch,
        config=config(workers, unreadable_share),
        what="patches",
    )
    return list(found)


def collected(
    backbone: SmallBackbone, images: FolderImages, dtype: torch.dtype = torch.float16
) -> PatchSet:
    return collect_patches(
        backbone,
        images,
        patch_keys(range(len(images)), seed=7),
        BOXES,
        layers=("feature3", "embedding"),
        patch_px=32,
        batch=4,
        config=config(),
        what="patches",
        dtype=dtype,
    )


def joined(batches: Sequence[EncodedPatches], layer: str) -> Tensor:
    return torch.cat([batch.features[layer] for batch in batches])


def plain_patch(image: Image.Image, box: Sequence[int], patch_px: int) -> Tensor:
    x1, y1, x2, y2 = box
    pixels = torch.from_numpy(np.array(image)[y1:y2, x1:x2].copy()).permute(2, 0, 1).float()
    size = (patch_px, patch_px)
    return interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]


@pytest.mark.parametrize("patch_px", [17, 32, 96])
def test_patches_are_cut_and_resized_as_torch_and_pillow_do(
    images: FolderImages, patch_px: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Larger and smaller than the patches, of their size, not square, at the borders; two images
    boxes = [(0, 0, 90, 70), (3, 5, 99, 64), (58, 38, 90, 70), (1, 2, 18, 19), (7, 0, 9, 64)]
    numbers = np.array([0, 1, 0, 0, 1])
    pictures = [images.read(0), images.read(1)]
    flat = flat_images([np.array(each) for each in pictures], CPU)
    cut = cut_resized(flat, numbers, np.array(boxes), patch_px)
    for patch, number, box in zip(cut, numbers, boxes, strict=True):
        twin = plain_patch(pictures[number], box, patch_px)
        torch.testing.assert_close(patch, twin, atol=2e-3, rtol=0)
        # Pillow rounds to whole gray levels, after the rows and after the columns.
        resized = pictures[number].crop(box).resize((patch_px,) * 2, Image.Resampling.BILINEAR)
        by_pillow = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
        assert (patch - by_pillow).abs().max() < 1.6
    # How many boxes are resized at once, on a GPU, does not matter.
    for work_bytes in (1, 48 * 64 * 90 * 2, 2**30):
        monkeypatch.setattr("relloc.studies.patch_sets._WORK_BYTES", work_bytes)
        together = _cut_together(flat, numbers, np.array(boxes), patch_px)
        torch.testing.assert_close(together, cut, atol=2e-3, rtol=0)


@pytest.mark.gpu
def test_a_gpu_cuts_and_keeps_the_same_patches(
    backbone: SmallBackbone, images: FolderImages
) -> None:
    gpu = torch.device("cuda")
    pictures = [np.array(images.read(index)) for index in (0, 1)]
    boxes = np.array([(0, 0, 90, 70), (3, 5, 99, 64), (58, 38, 90, 70), (1, 2, 18, 19)])
    numbers = np.array([0, 1, 0, 0])
    on_cpu = cut_resized(flat_images(pictures, CPU), numbers, boxes, 32)
    on_gpu = cut_resized(flat_images(pictures, gpu), numbers, boxes, 32)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=0.3, rtol=0)
    kept = collect_patches(
        copy.deepcopy(backbone).to(gpu),
        images,
        patch_keys(range(len(images)), seed=7),
        BOXES,
        layers=("feature3", "embedding"),
        patch_px=32,
        batch=4,
        config=dataclasses.replace(config(), device=gpu),
        what="patches",
    )
    expected = collected(backbone, images)
    for layer, vectors in kept.vectors.items():
        assert vectors.device.type == "cuda"
        torch.testing.assert_close(vectors.cpu(), expected.vectors[layer], atol=0.02, rtol=0)


def test_boxes_of_the_size_of_patches_keep_their_pixels(images: FolderImages) -> None:
    pixels = np.array(images.read(3))
    boxes = np.array([(5, 6, 37, 38), (45, 91, 77, 123)])
    for cutting in (cut_resized, _cut_together):
        first, second = cutting(flat_images([pixels], CPU), np.array([0, 0]), boxes, 32)
        assert np.array_equal(first.permute(1, 2, 0), pixels[6:38, 5:37])
        assert np.array_equal(second.permute(1, 2, 0), pixels[91:, 45:])


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
    for name in ("images", "places", "boxes"):
        expected = np.concatenate([getattr(each, name) for each in usual])
        found = np.concatenate([getattr(each, name) for each in other])
        assert expected.tolist() == found.tolist()
    for layer in PATCH_LAYERS:
        torch.testing.assert_close(joined(other, layer), joined(usual, layer), atol=1e-5, rtol=1e-4)


def test_random_squares_lie_within_the_image_and_depend_on_the_seed_alone() -> None:
    many = RandomSquares(n=500, sides_px=(3, 8, 50))
    boxes = many(9, 12, seed=5)
    assert boxes.shape == (500, 4)
    assert set((boxes[:, 2] - boxes[:, 0]).tolist()) == {3, 8}
    assert (boxes[:, 3] - boxes[:, 1] == boxes[:, 2] - boxes[:, 0]).all()
    assert boxes.min() == 0
    assert boxes[:, 2].max() == 12
    assert boxes[:, 3].max() == 9
    assert (many(9, 12, seed=5) == boxes).all()
    assert (many(9, 12, seed=6) != boxes).any()
    assert len(many(2, 100, seed=5)) == 0


def test_collected_patches_are_unit_vectors_whose_products_are_correlations(
    backbone: SmallBackbone, images: FolderImages
) -> None:
    patches = collected(backbone, images, torch.float32)
    assert len(patches) == 12
    found = encoded(backbone, images)
    for layer in ("feature3", "embedding"):
        expected = np.corrcoef(joined(found, layer).double().numpy())
        vectors = patches.vectors[layer]
        np.testing.assert_allclose((vectors @ vectors.T).numpy(), expected, atol=1e-5)
        half = collected(backbone, images).vectors[layer]
        assert half.dtype == torch.float16
        torch.testing.assert_close(half.float(), vectors, atol=3e-4, rtol=0)
    assert patches.images.tolist() == np.concatenate([each.images for each in found]).tolist()
    assert patches.boxes.tolist() == np.concatenate([each.boxes for each in found]).tolist()


def test_vectors_of_equal_components_correlate_with_nothing() -> None:
    features = torch.tensor([[0.1] * 7, [0.0] * 7, [1.0, 2, 3, 4, 5, 6, 7], [1e-20] * 6 + [2e-20]])
    vectors = unit_vectors(features)
    assert not vectors[:2].any()
    torch.testing.assert_close(vectors[2].norm(), torch.tensor(1.0))
    torch.testing.assert_close(vectors[2], unit_vectors(features * 1e4 - 3e4)[2])


def test_an_image_that_cannot_be_read_is_left_out_and_named(
    backbone: SmallBackbone, images: FolderImages, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(images.paths[1]).read_bytes()[:300])
    paths = [images.paths[0], str(broken), *images.paths[2:]]
    with_broken = FolderImages(name="made", split="train", paths=paths, labels=[], classes=())
    found = encoded(backbone, with_broken, unreadable_share=0.5)
    assert set(np.concatenate([each.images for each in found])) == {0, 3, 4}
    # Places count keys, so that those of images behind it stay.
    assert set(np.concatenate([each.places for each in found])) == {0, 3, 4}
    with pytest.raises(DataError, match=r"broken\.png"):
        encoded(backbone, with_broken)


def test_a_collection_without_patches_and_one_that_is_too_large_are_refused(
    backbone: SmallBackbone, images: FolderImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = FolderImages(name="s", split="train", paths=images.paths[2:3], labels=[], classes=())
    with pytest.raises(DataError, match="smaller"):
        collected(backbone, small)
    monkeypatch.setattr("relloc.studies.patch_sets.free_gib", lambda _device: 1e-9)
    with pytest.raises(UsageError, match="15 patches at feature3, embedding"):
        collected(backbone, images)


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
    found = encode_patches(
        backbone,
        images,
        [(0, 0)],
        boxes,
        layers=("embedding",),
        patch_px=32,
        batch=4,
        config=config(),
        what="patches",
    )
    with pytest.raises(ValueError, match="box"):
        list(found)


def test_a_random_patch_is_a_view_of_a_square_that_fits() -> None:
    view = RandomPatch(sides_px=(30, 60), patch_px=24)
    image = picture(40, 90)
    pixels = view(image, random.Random(3))
    assert pixels.shape == (24, 24, 3)
    rng = random.Random(3)
    rng.choice([30])
    left, top = rng.randint(0, 60), rng.randint(0, 10)
    cut = image.crop((left, top, left + 30, top + 30)).resize((24, 24), Image.Resampling.BILINEAR)
    assert pixels.tobytes() == np.asarray(cut).tobytes()
    # Of a smaller image it is the largest square.
    assert view(picture(20, 90), random.Random(3)).shape == (24, 24, 3)
    assert "30 or 60 px" in str(view)


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


@pytest.mark.parametrize(
    ("sides_px", "patch_px", "setting"),
    [([], 96, "sides_px"), ([0], 96, "sides_px"), ([9], 0, "patch_px")],
)
def test_a_wrong_view_is_told_by_the_settings_of_its_study(
    sides_px: list[int], patch_px: int, setting: str
) -> None:
    with pytest.raises(UsageError, match=rf"study\.\w+\.{setting} is "):
        RandomPatch(sides_px=sides_px, patch_px=patch_px)
