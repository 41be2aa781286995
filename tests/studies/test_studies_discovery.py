"""Discovery as a whole: a planted object is found, and what is written and refused."""

import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from contexts import context
from mixed_folder import picture
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from relloc.data.folder import FolderImages
from relloc.data.image_set import Splits
from relloc.data.photos import PhotoTiles
from relloc.data.subsets import Subset
from relloc.errors import DataError, UsageError
from relloc.evaluation.contract import EvalSettings, EvaluatedModel, print_nothing
from relloc.evaluation.run import fingerprint
from relloc.features.source import EncodeConfig
from relloc.models.backbone import Backbone
from relloc.models.small import SmallBackbone
from relloc.results import Score
from relloc.studies.discovery import Discovery
from relloc.studies.patch_sets import RandomPatch
from relloc.studies.square_fit import Verification

N_IMAGES = 20
PLANTED = [1, 2, 5, 8, 11, 12, 17]  # images with the object
OTHERS = [index for index in range(N_IMAGES) if index not in PLANTED]
SIDE = 16
CLASSES = ("none", "object", "rare")


def discovery(**changes) -> Discovery:
    settings = {
        "split": "held_out",
        "classes": None,
        "n_images": None,
        "n_seeds": 40,
        "seed_places": "gradient",
        "seed_overlap": 0.6,
        "sides_px": [SIDE],
        "stride": 0.25,
        "patch_px": 32,
        "layer": "embedding",
        "top_images": 10,
        "verification": Verification(
            least_side=2 / 3, most_side=4 / 3, most_error=1.0, side_limits="reject"
        ),
        "set_size": 4,
        "n_sets": 100,
        "purest_first": True,
        "shuffles": 5,
        "view": RandomPatch(sides_px=[SIDE], patch_px=32),
        "batch": 64,
        "pictured": 3,
    }
    return Discovery(**{**settings, **changes})


def draw_image(index: int) -> Image.Image:
    """Little noise around a color of its own, and one object of many colors in some images."""
    rng = np.random.default_rng(index)
    height, width = (80, 96) if index % 2 else (88, 80)
    color = rng.integers(60, 190, 3)
    pixels = color + rng.integers(-3, 4, (height, width, 3))
    if index in PLANTED:
        # Larger than a constellation of 32 px, and on the grid of places, in steps of 4 px
        planted = np.asarray(picture(48, 48, seed=99))
        top = 4 * int(rng.integers(0, (height - 48) // 4 + 1))
        left = 4 * int(rng.integers(0, (width - 48) // 4 + 1))
        pixels[top : top + 48, left : left + 48] = planted
    return Image.fromarray(pixels.astype(np.uint8))


class ColorBackbone(Backbone):
    """Describes a patch by the mean colors of its 4 x 4 parts."""

    stage_channels = (3,) * 5
    pooled_sides = (2,) * 5
    embedding_dim = 48

    def layers_of_stages(self) -> list[list[nn.Module]]:
        return [[nn.Identity()] for _ in range(5)]

    def embed(self, patches: Tensor) -> Tensor:
        return adaptive_avg_pool2d(patches, 4).flatten(1)


class Listed(FolderImages):
    """Images each of which may show several classes."""

    def presence(self) -> list[list[int]]:
        rows = []
        for index in range(len(self)):
            shows_object = 1 if index in PLANTED else -1
            # Difficult objects of the last class do not count.
            shows_rare = 0 if index in OTHERS[:5] else -1
            rows.append([-1, shows_object, shows_rare])
        return rows


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("images")
    found = []
    for index in range(N_IMAGES):
        found.append(str(folder / f"{index:02d}.png"))
        draw_image(index).save(found[-1])
    return found


def splits_of(paths: list[str], *, labeled: bool = True, kind=FolderImages) -> Splits:
    labels = [int(index in PLANTED) for index in range(len(paths))] if labeled else None
    if kind is Listed:
        images = Listed(name="made", split="val", paths=paths, classes=CLASSES)
    else:
        images = FolderImages(name="made", split="val", paths=paths, labels=labels, classes=CLASSES)
    return Splits(train=images, held_out=images)


def backbone(seed: int = 0) -> SmallBackbone:
    torch.manual_seed(seed)
    return SmallBackbone(widths=(8, 8, 16, 16, 32)).eval()


def run(
    evaluation: Discovery,
    splits: Splits,
    folder: Path,
    *,
    network: Backbone | None = None,
    seed: int = 0,
    workers: int = 0,
    print_line: Callable[[str], None] = print_nothing,
) -> dict[str, Score]:
    config = EncodeConfig(
        batch=16,
        workers=workers,
        device=torch.device("cpu"),
        precision="fp32",
        unreadable_share=0.0,
    )
    made = context(
        splits=splits,
        backbone=network or backbone(),
        encode_config=config,
        folder=folder,
        seed=seed,
        print_line=print_line,
    )
    evaluation.check(splits)
    return {score.metric: score for score in evaluation.run(made)}


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_planted_object_is_the_first_cluster(paths, tmp_path):
    scores = run(discovery(), splits_of(paths), tmp_path, network=ColorBackbone())
    clusters = table(tmp_path / "clusters.csv")
    first = clusters[0]
    assert int(first["image"]) in PLANTED
    # All other images with the object, and no other one, are verified.
    assert int(first["verified"]) == len(PLANTED) - 1
    assert first["most_frequent_class"] == "object 100 %"
    assert first["selected"] == "1"
    assert first["searched"] == "10"
    verified = [int(line["verified"]) for line in clusters]
    assert verified == sorted(verified, reverse=True)

    found = [line for line in table(tmp_path / "cluster_images.csv") if line["selected"] == "1"]
    images = {int(line["image"]) for line in found}
    assert images == set(PLANTED) - {int(first["image"])}
    # The matches are the object's quarters, whole and in their order.
    for line in found:
        left = int(line["upper_left_x1"])
        top = int(line["upper_left_y1"])
        assert abs(int(line["upper_right_x1"]) - left - SIDE) <= SIDE / 2
        assert abs(int(line["lower_left_y1"]) - top - SIDE) <= SIDE / 2

    curve = [line for line in table(tmp_path / "purity_coverage.csv") if line["labels"] == "true"]
    assert float(curve[0]["mean_purity"]) == 1
    assert float(curve[0]["coverage"]) == 4 / N_IMAGES
    area = scores["purity_coverage_area"]
    assert area.headline
    assert area.n == N_IMAGES
    assert 20 < area.value <= 100
    assert scores["purity_coverage_area_to_half"].value <= 50
    assert scores["purity_coverage_area_chance"].value < area.value
    assert not scores["verified_images"].headline
    for name in ("clusters.png", "purity_coverage.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 100


def test_neither_batch_size_nor_workers_decide_anything(paths, tmp_path):
    few = discovery(n_seeds=20)
    # With these features constellations are found again.
    network = ColorBackbone()
    first = run(few, splits_of(paths), tmp_path / "1", network=network)
    before = table(tmp_path / "1" / "cluster_images.csv")
    assert before
    for name, batch, workers in (("2", 50, 0), ("3", 1000, 2)):
        folder = tmp_path / name
        again_few = dataclasses.replace(few, batch=batch)
        again = run(again_few, splits_of(paths), folder, network=network, workers=workers)
        for metric, score in first.items():
            assert again[metric].value == pytest.approx(score.value, abs=1e-6), metric
        for line, expected in zip(table(folder / "cluster_images.csv"), before, strict=True):
            assert float(line.pop("score")) == pytest.approx(float(expected["score"]), abs=2e-4)
            expected = {key: value for key, value in expected.items() if key != "score"}
            assert line == expected


def seeds_in(folder: Path) -> list[tuple[str, ...]]:
    names = ("constellation", "image", "left", "top", "side_px")
    lines = [tuple(line[name] for name in names) for line in table(folder / "clusters.csv")]
    return sorted(lines)


def test_all_networks_search_the_same_constellations(paths, tmp_path):
    few = discovery(n_images=8, n_seeds=15)
    splits = splits_of(paths)
    run(few, splits, tmp_path / "1")
    run(few, splits, tmp_path / "2", network=backbone(1))
    run(few, splits, tmp_path / "3", seed=1)
    assert seeds_in(tmp_path / "1") == seeds_in(tmp_path / "2")
    assert seeds_in(tmp_path / "1") != seeds_in(tmp_path / "3")


def test_images_without_labels_have_no_purity(paths, tmp_path):
    scores = run(discovery(n_seeds=10, layer="feature3"), splits_of(paths, labeled=False), tmp_path)
    assert set(scores) == {"verified_images", "coverage"}
    assert scores["verified_images"].headline
    assert scores["verified_images"].layer == "feature3"
    assert not (tmp_path / "purity_coverage.csv").exists()


def test_classes_choose_images_and_count_alone(paths, tmp_path):
    splits = splits_of(paths, kind=Listed)
    # With these features constellations have sets.
    network = ColorBackbone()
    of_object = discovery(classes=["object"])
    scores = run(of_object, splits, tmp_path, network=network)
    assert scores["purity_coverage_area"].n == len(PLANTED)
    images = {int(line["image"]) for line in table(tmp_path / "clusters.csv")}
    assert images <= set(PLANTED)
    # All images show the only class: purity is 1 wherever there is a set, also by chance.
    area = scores["purity_coverage_area"].value
    assert area > 0
    assert area == pytest.approx(scores["coverage"].value)
    assert area == pytest.approx(scores["purity_coverage_area_chance"].value)

    # Images that show no class are searched too, unless classes are named.
    scores = run(discovery(), splits, tmp_path, network=network)
    assert scores["purity_coverage_area"].n == N_IMAGES
    # Difficult objects are none.
    with pytest.raises(DataError):
        discovery(classes=["rare"]).check(splits)
    with pytest.raises(UsageError, match=r"study\.discovery\.classes is cat"):
        discovery(classes=["cat"]).check(splits)
    with pytest.raises(UsageError, match=r"study\.discovery\.classes"):
        discovery(classes=["object"]).check(splits_of(paths, labeled=False))


def test_few_images_and_no_set(paths, tmp_path):
    few = discovery(n_images=3, n_seeds=6, pictured=2)
    printed = []
    scores = run(few, splits_of(paths), tmp_path, print_line=printed.append)
    # Sets of four images can't be made of two others: no set, and no area.
    assert set(scores) == {"verified_images", "coverage"}
    assert not any(score.headline for score in scores.values())
    assert [line for line in printed if "study.discovery.set_size=4" in line]
    assert not (tmp_path / "purity_coverage.png").exists()
    assert scores["coverage"].value == 0
    assert {line["searched"] for line in table(tmp_path / "clusters.csv")} == {"2"}
    assert not table(tmp_path / "cluster_images.csv")


def test_images_too_small_for_a_constellation_are_refused(paths, tmp_path):
    large = discovery(sides_px=[48])
    with pytest.raises(DataError, match="96 x 96 px"):
        run(large, splits_of(paths), tmp_path)


def test_features_that_are_not_finite_are_refused(paths, tmp_path):
    broken = backbone()
    with torch.no_grad():
        broken.stem[0].weight.fill_(torch.nan)
    with pytest.raises(UsageError, match="NaN"):
        run(discovery(n_seeds=5), splits_of(paths), tmp_path, network=broken)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("split", "val"),
        ("classes", []),
        ("classes", "bus"),
        ("n_images", 1),
        ("n_seeds", 0),
        ("seed_places", "random"),
        ("seed_overlap", 1.5),
        ("sides_px", []),
        ("stride", 0),
        ("patch_px", 0),
        ("layer", "avgpool"),
        ("top_images", 0),
        ("set_size", 11),
        ("n_sets", 0),
        ("shuffles", 0),
        ("batch", 0),
        ("pictured", -1),
    ],
)
def test_bad_settings_are_named(name, value):
    made = discovery()
    object.__setattr__(made, name, value)  # the type checker of tests would be first
    with pytest.raises(UsageError, match=rf"study\.discovery\.{name}"):
        made.__post_init__()


def test_what_decides_no_number_is_not_in_the_fingerprint():
    first = discovery()
    assert repr(first) == repr(dataclasses.replace(first, batch=7, pictured=0))
    assert repr(first) != repr(dataclasses.replace(first, stride=0.5))


def test_images_of_one_source_are_refused(tmp_path):
    tiles = PhotoTiles(split="train", tiles=[0.2], stride=1.0)
    # The first photograph alone
    n_tiles = tiles.labels.index(1)
    images = Subset(images=tiles, indices=range(n_tiles))
    with pytest.raises(DataError, match="astronaut"):
        run(discovery(), Splits(train=images, held_out=images), tmp_path)


def test_other_classes_in_an_image_are_measured_anew(paths):
    class WithOthers(Listed):
        def presence(self) -> list[list[int]]:
            rows = super().presence()
            rows[0][0] = 1
            return rows

    model = EvaluatedModel(backbone=backbone(), checkpoint="random", model="small", weights="made")
    settings = EvalSettings(
        encode_config=context().encode_config,
        batch_norms=["as_trained"],
        calibration_images=8,
        bank_gib=1,
        seed=0,
    )
    prints = set()
    for kind in (Listed, WithOthers):
        images = kind(name="made", split="val", paths=paths, classes=CLASSES)
        splits = Splits(train=images, held_out=images)
        prints.add(fingerprint(discovery(), model, splits, settings, "as_trained"))
    assert len(prints) == 2
