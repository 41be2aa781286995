"""Patches of images as unit vectors in memory: what is kept, and what is too much."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from made_patches import BOXES, CPU, encode_config, encoded, joined, made_images, small_backbone

from relloc.data.folder import FolderImages
from relloc.errors import DataError, UsageError
from relloc.features.source import EncodeConfig
from relloc.models.small import SmallBackbone
from relloc.studies.patch_cutting import cut_resized, flat_images
from relloc.studies.patch_encoding import PatchEncoder
from relloc.studies.patch_sets import patch_keys
from relloc.studies.patch_vectors import CollectedPatches, collect_patches, unit_vectors


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> FolderImages:
    return made_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def backbone() -> SmallBackbone:
    return small_backbone()


def collected(
    backbone: SmallBackbone,
    images: FolderImages,
    dtype: torch.dtype = torch.float16,
    config: EncodeConfig | None = None,
) -> CollectedPatches:
    encoder = PatchEncoder(
        backbone=backbone,
        layers=("feature3", "embedding"),
        patch_px=32,
        batch=4,
        config=config or encode_config(),
    )
    keys = patch_keys(range(len(images)), seed=7)
    return collect_patches(encoder, images, keys, BOXES, what="patches", dtype=dtype)


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


def test_a_collection_without_patches_and_one_that_is_too_large_are_refused(
    backbone: SmallBackbone, images: FolderImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = FolderImages(name="s", split="train", paths=images.paths[2:3], labels=[], classes=())
    with pytest.raises(DataError, match="smaller"):
        collected(backbone, small)
    monkeypatch.setattr("relloc.studies.patch_vectors.free_gib", lambda _device: 1e-9)
    with pytest.raises(UsageError, match="15 patches at feature3, embedding"):
        collected(backbone, images)


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
    config = dataclasses.replace(encode_config(), device=gpu)
    kept = collected(copy.deepcopy(backbone).to(gpu), images, config=config)
    expected = collected(backbone, images)
    for layer, vectors in kept.vectors.items():
        assert vectors.device.type == "cuda"
        torch.testing.assert_close(vectors.cpu(), expected.vectors[layer], atol=0.02, rtol=0)
