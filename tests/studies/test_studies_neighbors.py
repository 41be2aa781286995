"""The study of nearest patches beside a plain twin: a full matrix of correlations."""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contexts import context
from mixed_folder import picture

from relloc.data.folder import FolderImages
from relloc.data.image_set import Splits
from relloc.errors import DataError, UsageError
from relloc.evaluation.contract import Context
from relloc.features.source import EncodeConfig
from relloc.models.small import SmallBackbone
from relloc.results import Score
from relloc.studies.neighbors import Neighbors
from relloc.studies.patch_encoding import PatchEncoder, encode_patches
from relloc.studies.patch_sets import RandomPatch, RandomSquares, patch_keys
from relloc.studies.patch_vectors import unit_vectors

N_IMAGES = 14
RIGHT: dict[str, Any] = {
    "layers": ["embedding", "feature2"],
    "split": "train",
    "n_images": 100,
    "patches_per_image": 3,
    "sides_px": [24, 32],
    "patch_px": 32,
    "queries": 6,
    "chosen": [],
    "k": 4,
    "one_per_image": True,
    "own_image": False,
    "drawn": 2,
    "view": RandomPatch(sides_px=[24, 32], patch_px=32),
    "batch": 8,
}


def study(**changes: Any) -> Neighbors:
    return Neighbors(**{**RIGHT, **changes})


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> FolderImages:
    folder = tmp_path_factory.mktemp("images")
    paths = []
    for number in range(N_IMAGES):
        paths.append(str(folder / f"{number}.png"))
        # The fifth is too small for any patch.
        height = 20 if number == 5 else 40 + number
        picture(height, 60, seed=number).save(paths[-1])
    labels = [number % 3 for number in range(N_IMAGES)]
    return FolderImages(
        name="made", split="train", paths=paths, labels=labels, classes=("a", "b", "c")
    )


def context_of(
    images: FolderImages, folder: Path, workers: int = 0, seed: int = 3, **more: Any
) -> Context:
    torch.manual_seed(0)
    return context(
        **more,
        backbone=SmallBackbone(widths=(8, 8, 8, 10, 12)).eval(),
        splits=Splits(train=images, held_out=images),
        encode_config=EncodeConfig(
            batch=16,
            workers=workers,
            device=torch.device("cpu"),
            precision="fp32",
            unreadable_share=0.2,
        ),
        seed=seed,
        folder=folder,
        checkpoint="random",
    )


def run(images: FolderImages, folder: Path, workers: int = 0, **changes: Any) -> list[Score]:
    return list(study(**changes).run(context_of(images, folder, workers)))


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "neighbors.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def by_metric(scores: Sequence[Score], layer: str) -> dict[str, Score]:
    return {score.metric: score for score in scores if score.layer == layer}


@pytest.mark.parametrize("layer", ["embedding", "feature2"])
@pytest.mark.parametrize(
    ("one_per_image", "own_image"), [(True, False), (False, True), (True, True)]
)
def test_neighbors_and_numbers_are_those_of_the_full_matrix(
    images: FolderImages, tmp_path: Path, layer: str, one_per_image: bool, own_image: bool
) -> None:
    scores = run(images, tmp_path, one_per_image=one_per_image, own_image=own_image)
    made = context_of(images, tmp_path)
    encoder = PatchEncoder(
        backbone=made.backbone,
        layers=[layer],
        patch_px=32,
        batch=50,
        config=made.encode_config,
    )
    keys = patch_keys(range(N_IMAGES), seed=3)
    boxes = RandomSquares(n=3, sides_px=(24, 32))
    (patches,) = encode_patches(encoder, images, keys, boxes, what="")
    exact = np.corrcoef(patches.features[layer].double().numpy())
    # The search is exact on what is kept, in float16: there nearly equal ones may change places.
    kept = unit_vectors(patches.features[layer]).half().double()
    kept = kept / kept.norm(dim=1, keepdim=True)
    matrix = (kept @ kept.T).numpy()
    np.testing.assert_allclose(matrix, exact, atol=2e-3)
    places = [
        (images.source(index), *map(str, box))
        for index, box in zip(patches.images.tolist(), patches.boxes.tolist(), strict=True)
    ]
    lines = [line for line in table(tmp_path) if line["layer"] == layer]
    n_same, similarities, means = 0, [], []
    box_columns = ("x1", "y1", "x2", "y2")
    for query in range(1, 7):
        of_query = [line for line in lines if line["query"] == str(query)]
        first = of_query[0]
        place = (first["query_image"], *(first[f"query_{name}"] for name in box_columns))
        row = places.index(place)
        found = []
        for other in np.argsort(-matrix[row], kind="stable").tolist():
            used = [places[each][0] for each in found]
            is_own = places[other][0] == place[0] and not own_image
            is_again = places[other][0] in used and one_per_image
            if len(found) < 4 and other != row and not is_own and not is_again:
                found.append(other)
        assert [line["rank"] for line in of_query] == ["1", "2", "3", "4"]
        neighbors = [(line["image"], *(line[name] for name in box_columns)) for line in of_query]
        assert neighbors == [places[other] for other in found]
        given = [float(line["similarity"]) for line in of_query]
        np.testing.assert_allclose(given, matrix[row, found], atol=1e-5)
        n_same += sum(line["class"] == line["query_class"] for line in of_query)
        similarities.append(matrix[row, found[0]])
        means.append(matrix[row].mean())
    rows = by_metric(scores, "" if layer == "embedding" else layer)
    assert rows["same_class_k4"].value == pytest.approx(100 * n_same / 24)
    assert rows["nearest_correlation"].value == pytest.approx(np.mean(similarities), abs=1e-5)
    assert rows["mean_correlation"].value == pytest.approx(np.mean(means), abs=1e-3)
    assert {score.n for score in scores} == {6}
    assert all(score.on_train for score in scores)


def test_chance_is_the_share_of_the_class_among_what_may_be_found(
    images: FolderImages, tmp_path: Path
) -> None:
    scores = run(images, tmp_path, queries=1000, k=1, drawn=0)
    chance = by_metric(scores, "")["same_class_chance"]
    assert chance.n == 13
    # Without image 5: five of a, five of b, three of c. The query's own image does not count.
    of_classes = [5 * 4 / 12, 5 * 4 / 12, 3 * 2 / 12]
    assert chance.value == pytest.approx(100 * sum(of_classes) / 13)
    assert chance.higher_is_better is None
    own = run(images, tmp_path, queries=1000, k=1, drawn=0, own_image=True)
    # Of 39 patches, 15 are of a, 15 of b and 9 of c; the query itself is no neighbor.
    of_classes = [5 * 14 / 38, 5 * 14 / 38, 3 * 8 / 38]
    assert by_metric(own, "")["same_class_chance"].value == pytest.approx(
        100 * sum(of_classes) / 13
    )
    same_class = by_metric(scores, "")["same_class_k1"]
    assert same_class.low is not None
    assert same_class.low <= same_class.value <= same_class.high


def test_batches_workers_and_layers_change_no_neighbor(
    images: FolderImages, tmp_path: Path
) -> None:
    run(images, tmp_path / "usual")
    run(images, tmp_path / "other", workers=2, batch=3, drawn=0)
    run(images, tmp_path / "one", layers=["feature2"])
    usual = table(tmp_path / "usual")

    def without_similarity(lines: Sequence[dict[str, str]]) -> list[tuple[str, ...]]:
        return [tuple(line.values())[:-1] for line in lines]

    assert without_similarity(table(tmp_path / "other")) == without_similarity(usual)
    of_layer = [line for line in usual if line["layer"] == "feature2"]
    assert table(tmp_path / "one") == of_layer
    drawn = sorted(path.name for path in (tmp_path / "usual").glob("*.png"))
    assert drawn == ["neighbors_embedding.png", "neighbors_feature2.png"]
    assert not list((tmp_path / "other").glob("*.png"))


def test_findings_are_told_in_words(images: FolderImages, tmp_path: Path) -> None:
    told: list[str] = []
    list(study().run(context_of(images, tmp_path, print_line=told.append)))
    assert len(told) == 4  # a sheet and a sentence for each layer
    assert "neighbors_embedding.png" in told[0]
    assert "embedding" in told[1]
    assert "by chance" in told[1]


def test_images_without_labels_have_correlations_alone(
    images: FolderImages, tmp_path: Path
) -> None:
    unlabeled = dataclasses.replace(images, labels=[], classes=())
    scores = run(unlabeled, tmp_path)
    assert {score.metric for score in scores} == {"nearest_correlation", "mean_correlation"}
    assert [score.headline for score in scores] == [True, False] * 2
    assert "class" not in table(tmp_path)[0]


def test_chosen_queries_take_the_place_of_random_ones(images: FolderImages, tmp_path: Path) -> None:
    chosen = [
        {"image": "9.png", "box": [3, 4, 35, 36]},
        {"image": 5, "box": [0, 0, 20, 20]},
        {"image": "9.png", "box": [0, 0, 24, 24]},
    ]
    scores = run(images, tmp_path, chosen=chosen, k=20)
    assert {score.n for score in scores} == {3}
    assert by_metric(scores, "")["same_class_k20"].low is None
    lines = [line for line in table(tmp_path) if line["layer"] == "embedding"]
    queries = {line["query"]: line for line in lines}
    boxes = [tuple(queries[name][f"query_{x}"] for x in ("x1", "y1", "x2", "y2")) for name in "123"]
    assert boxes == [("3", "4", "35", "36"), ("0", "0", "20", "20"), ("0", "0", "24", "24")]
    # One neighbor of each image but the query's; image 5 has no patches in the collection.
    counts = [sum(line["query"] == name for line in lines) for name in "123"]
    assert counts == [12, 13, 12]
    assert all(line["image"] != line["query_image"] for line in lines)


def test_an_image_that_cannot_be_read_is_left_out(images: FolderImages, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n")
    with_broken = dataclasses.replace(images, paths=[*images.paths[:-1], str(broken)])
    scores = run(with_broken, tmp_path, queries=1000, k=1)
    assert {score.n for score in scores} == {12}
    with pytest.raises(UsageError, match=r"chosen\[0\]\.image .*broken"):
        run(with_broken, tmp_path, chosen=[{"image": "broken.png", "box": [0, 0, 5, 5]}])


def test_one_image_has_no_neighbors_unless_they_are_its_own(
    images: FolderImages, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="own_image=true"):
        run(images, tmp_path, n_images=1)
    scores = run(images, tmp_path, n_images=1, own_image=True, one_per_image=False)
    # The other two patches; the query itself would have 1.
    assert by_metric(scores, "")["nearest_correlation"].value < 0.999
    assert len(table(tmp_path)) == 2 * 2


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("layers", ["avgpool"]), ("split", "val"), ("n_images", 0), ("patches_per_image", 1.5)),
        *(("sides_px", []), ("sides_px", 96), ("patch_px", 0), ("queries", 0), ("k", 0)),
        *(("one_per_image", 1), ("own_image", "no"), ("drawn", -1), ("batch", 0), ("view", None)),
        *(("chosen", "a.jpg"), ("chosen", None)),
    ],
)
def test_wrong_settings_are_told_by_name(setting: str, value: object) -> None:
    made = study()
    object.__setattr__(made, setting, value)  # the type checker of tests would be first
    with pytest.raises(UsageError, match=rf"study\.neighbors\.{setting} is "):
        made.__post_init__()


def test_a_box_beyond_its_image_is_told_with_the_size_of_the_image(
    images: FolderImages, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"chosen\[0\]\.box .* 60 x 40 px"):
        run(images, tmp_path, chosen=[{"image": 0, "box": [0, 0, 61, 30]}])


def test_what_decides_no_number_is_not_in_the_fingerprint() -> None:
    first = study()
    assert repr(first) == repr(study(batch=7))
    assert repr(first) != repr(study(k=5))
