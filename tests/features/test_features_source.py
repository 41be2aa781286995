from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from relloc.data.folder import FolderImages
from relloc.data.views import Center
from relloc.errors import DataError
from relloc.features.bank import fill_bank
from relloc.features.pool import pooled_layers
from relloc.features.source import EncodeConfig, FeatureSource, LiveFeatures, encode
from relloc.models.resnet import ResNetBackbone
from relloc.models.small import SmallBackbone
from relloc.seeds import Use, seed_for

CPU = torch.device("cpu")
LAYERS = ("feature2", "feature5", "avgpool")
PX = 64
VIEW = Center(short_px=PX, crop_px=PX)
BROKEN = (3, 4, 8)


@pytest.fixture
def backbone() -> SmallBackbone:
    torch.manual_seed(0)
    return SmallBackbone(widths=(8, 8, 8, 10, 8)).eval()


def write_images(folder: Path, n: int, broken: tuple[int, ...] = ()) -> FolderImages:
    rng = np.random.default_rng(0)
    paths = [folder / f"{index}.png" for index in range(n)]
    for index, path in enumerate(paths):
        Image.fromarray(rng.integers(256, size=(PX, PX, 3), dtype=np.uint8)).save(path)
        if index in broken:
            path.write_bytes(b"no image")
    labels = [index % 3 for index in range(n)]
    return FolderImages(
        name="noise",
        split="train",
        paths=[str(path) for path in paths],
        labels=labels,
        classes=("a", "b", "c"),
    )


def reading(**changes: object) -> EncodeConfig:
    settings = {"batch": 4, "workers": 0, "device": CPU, "precision": "fp32"}
    return EncodeConfig(**{**settings, "unreadable_share": 0.5, **changes})  # type: ignore[arg-type]


def gathered(
    source: FeatureSource, indices: Iterable[int], size: int
) -> tuple[dict[str, Tensor], Tensor]:
    found = list(source.batches(torch.tensor(list(indices)), size, LAYERS))
    features = {layer: torch.cat([batch[layer] for batch, _ in found]) for layer in LAYERS}
    return features, torch.cat([labels for _, labels in found])


def assert_same_features(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for layer, rows in one.items():
        torch.testing.assert_close(rows, other[layer], rtol=1e-4, atol=1e-5, msg=layer)


def test_features_are_the_pooled_stages_of_the_normalized_image(
    tmp_path: Path, backbone: SmallBackbone
) -> None:
    images = write_images(tmp_path, 4)
    features, labels = gathered(
        LiveFeatures(backbone.train(), images, reading(), VIEW), range(4), 4
    )
    pixels = torch.stack(
        [
            torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255
            for path in images.paths
        ]
    )
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalized = (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        assert_same_features(features, pooled_layers(backbone.eval(), normalized, LAYERS))
    assert labels.tolist() == [0, 1, 2, 0]
    assert all(not rows.requires_grad for rows in features.values())


def test_a_bank_has_the_live_features_row_by_row(tmp_path: Path, backbone: SmallBackbone) -> None:
    live = LiveFeatures(backbone, write_images(tmp_path, 7), reading(), VIEW)
    bank = fill_bank(live, LAYERS, 3, CPU)
    assert (bank.n, bank.n_classes, live.n, live.n_classes) == (7, 3, 7, 3)
    assert bank.dims == {layer: live.dims[layer] for layer in LAYERS}
    assert bank.channels == live.channels
    order = [5, 0, 6, 2, 2]
    of_live, live_labels = gathered(live, order, 2)
    of_bank, bank_labels = gathered(bank, order, 3)
    assert_same_features(of_live, of_bank)
    assert torch.equal(live_labels, bank_labels)
    assert bank_labels.tolist() == [5 % 3, 0, 0, 2, 2]
    rows = of_bank["avgpool"]
    assert torch.equal(rows[3], rows[4])
    assert torch.pdist(rows[:4]).min() > 1e-3  # the images differ, so their order shows


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_the_batch_size_changes_nothing(tmp_path: Path, backbone: SmallBackbone, size: int) -> None:
    live = LiveFeatures(backbone, write_images(tmp_path, 7, broken=(3,)), reading(), VIEW)
    features, labels = gathered(live, range(7), 3)
    others, other_labels = gathered(live, range(7), size)
    assert_same_features(features, others)
    assert torch.equal(labels, other_labels)
    sizes = [len(batch_labels) for _, batch_labels in live.batches(torch.arange(7), size, LAYERS)]
    assert max(sizes) <= size
    assert min(sizes) > 0


def test_images_that_can_not_be_read_drop_out_and_are_named(
    tmp_path: Path, backbone: SmallBackbone
) -> None:
    images = write_images(tmp_path, 9, broken=BROKEN)
    live = LiveFeatures(backbone, images, reading(), VIEW)
    bank = fill_bank(live, LAYERS, 2, CPU)
    readable = [index for index in range(9) if index not in BROKEN]
    features, labels = gathered(live, readable, 4)
    assert bank.n == 6
    assert_same_features(bank.features, features)
    assert torch.equal(bank.labels, labels)
    assert bank.labels.tolist() == [index % 3 for index in readable]
    assert set(live.unreadable.reasons) == {images.paths[index] for index in BROKEN}


def test_too_many_unreadable_images_stop_the_run(tmp_path: Path, backbone: SmallBackbone) -> None:
    live = LiveFeatures(
        backbone, write_images(tmp_path, 9, broken=BROKEN), reading(unreadable_share=0.2), VIEW
    )
    with pytest.raises(DataError, match=r"2 of 9 images .*data\.unreadable_share=0\.2"):
        fill_bank(live, LAYERS, 2, CPU)


def test_bfloat16_moves_features_by_rounding_alone_and_they_stay_float32(
    tmp_path: Path, backbone: SmallBackbone
) -> None:
    images = write_images(tmp_path, 4)
    exact, _ = gathered(LiveFeatures(backbone, images, reading(), VIEW), range(4), 4)
    rounded, _ = gathered(
        LiveFeatures(backbone, images, reading(precision="bf16"), VIEW), range(4), 4
    )
    for layer, rows in rounded.items():
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows, exact[layer], rtol=0.1, atol=0.03)
        assert not torch.equal(rows, exact[layer])


def test_unlabeled_images_are_an_error(tmp_path: Path, backbone: SmallBackbone) -> None:
    images = write_images(tmp_path, 2)
    unlabeled = FolderImages(name="mine", split="held_out", paths=images.paths)
    with pytest.raises(ValueError, match="mine held_out has no labels"):
        LiveFeatures(backbone, unlabeled, reading(), VIEW)


def test_progress_tells_the_epoch_of_how_many_where_there_are_several(
    tmp_path: Path, backbone: SmallBackbone
) -> None:
    reported = []

    def progress(batches: Iterable, what: str, total: int) -> Iterable:
        reported.append(what)
        return batches

    live = LiveFeatures(backbone, write_images(tmp_path, 4), reading(progress=progress), VIEW)
    for asked in ((), (0, 28), (2, 28)):
        next(live.batches(torch.arange(4), 4, LAYERS, *asked))
    assert reported == [
        f"features of noise train{ending}" for ending in ("", ", epoch 1 of 28", ", epoch 3 of 28")
    ]


def test_progress_sees_every_batch(tmp_path: Path, backbone: SmallBackbone) -> None:
    reported: list[tuple[str, int]] = []
    counted: list[object] = []

    def progress(batches: Iterable, what: str, total: int) -> Iterable:
        reported.append((what, total))
        for batch in batches:
            counted.append(batch)
            yield batch

    live = LiveFeatures(backbone, write_images(tmp_path, 7), reading(progress=progress), VIEW)
    gathered(live, range(7), 3)
    assert reported == [("features of noise train", 3)]
    assert len(counted) == 3


def test_full_batches_are_encoded_by_what_was_compiled_and_others_as_they_are(
    tmp_path: Path, backbone: SmallBackbone
) -> None:
    sizes: list[int] = []

    def compiled(*of: Any) -> dict[str, Tensor]:
        sizes.append(len(of[1]))
        return encode(*of)

    images = write_images(tmp_path, 7)
    plain, _ = gathered(LiveFeatures(backbone, images, reading(), VIEW), range(7), 3)
    found, _ = gathered(LiveFeatures(backbone, images, reading(encode=compiled), VIEW), range(7), 3)
    assert sizes == [3, 3]
    assert_same_features(found, plain)


def test_a_fused_network_is_that_of_the_weights_of_now(tmp_path: Path) -> None:
    """It is made anew for each pass over the images."""
    torch.manual_seed(0)
    network = ResNetBackbone(depth=18, width=0.25).eval()
    images = write_images(tmp_path, 5)
    fused = LiveFeatures(network, images, reading(fuses=True), VIEW)
    plain = LiveFeatures(network, images, reading(), VIEW)
    errors = []
    for _ in range(2):
        found, labels = gathered(fused, range(5), 2)
        expected, _ = gathered(plain, range(5), 2)
        assert labels.tolist() == [0, 1, 2, 0, 1]
        for layer in LAYERS:
            difference = found[layer] - expected[layer]
            errors.append((difference.norm() / expected[layer].norm()).item())
        with torch.no_grad():
            network.conv1.weight.mul_(-1)
            network.bn1.bias.add_(1)
    # The network is in float32, and what is fused in bfloat16.
    assert 0 < max(errors) < 0.02


def test_colors_belong_to_image_and_epoch_and_are_changed_before_normalizing(
    tmp_path: Path, backbone: SmallBackbone
) -> None:
    given: list[tuple[float, list[int]]] = []

    class Black:
        def draw(self, seed: int) -> Sequence[float]:
            return [float(seed)]

        def change(self, images: Tensor, drawn: Tensor) -> Tensor:
            given.append((float(images.max()), drawn.flatten().tolist()))
            return torch.zeros_like(images)

    images = write_images(tmp_path, 4)
    source = LiveFeatures(backbone, images, reading(), VIEW, color=Black(), seed=5)
    asked = (([0, 1, 2, 3], 0), ([3, 2], 1))
    found = [next(source.batches(torch.tensor(order), 4, LAYERS, epoch)) for order, epoch in asked]
    assert all(0.9 < largest <= 1 for largest, _ in given)
    first = [seed_for(Use.AUGMENTED_COLOR, 5, 0, index) for index in range(4)]
    second = [seed_for(Use.AUGMENTED_COLOR, 5, 1, index) for index in (3, 2)]
    # Of seeds as floats the leading digits are left, which tell them apart.
    assert given[0][1] == pytest.approx(first, rel=1e-6)
    assert given[1][1] == pytest.approx(second, rel=1e-6)
    with torch.no_grad():
        of_black = encode(backbone, torch.zeros(4, 3, PX, PX, dtype=torch.uint8), LAYERS, False)
    assert_same_features(found[0][0], of_black)
