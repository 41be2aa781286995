import csv
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from contexts import MadeContext, context
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from relloc.data.folder import FolderImages
from relloc.data.views import Center
from relloc.errors import UsageError
from relloc.evals import label_free_files
from relloc.evals.label_free import Dse, LabelFree, Lidar
from relloc.features.bank import Bank
from relloc.features.dense_structure import dense_structure, unit_places
from relloc.features.lidar import ViewScatter
from relloc.features.pool import pooled_layers
from relloc.features.source import LiveFeatures
from relloc.features.spectrum import alpha_req, rankme, stable_rank
from relloc.figures.style import save_png
from relloc.models.small import SmallBackbone
from relloc.patches.normalize import ByDataset
from relloc.results import Score
from relloc.seeds import Use, seed_for

CPU = torch.device("cpu")
ROWS = torch.randn(60, 12, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 12)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables and pictures go below the current folder, as the folder of contexts is relative."""
    monkeypatch.chdir(tmp_path)
    # Rendering takes longer than most of these tests
    monkeypatch.setattr(label_free_files, "save_png", lambda figure, path: None)


def bank_of(**layers: Tensor) -> Bank:
    n = len(next(iter(layers.values())))
    return Bank(
        features=layers,
        labels=torch.zeros(n, dtype=torch.int64),
        n_classes=0,
        channels=dict.fromkeys(layers, 1),
    )


def evaluation(
    layers: Sequence[str] = ("feature4", "avgpool"), n_images: int = 100, batch: int = 7
) -> LabelFree:
    return LabelFree(
        layers=layers,
        n_images=n_images,
        view=Center(short_px=8, crop_px=8),
        batch=batch,
        lidar=None,
        dse=None,
    )


def scores(run: LabelFree, held_out: Bank) -> list[Score]:
    return list(run.run(context(held_out, held_out)))


def test_each_layer_has_the_measures_of_its_spectrum() -> None:
    run = evaluation()
    found = scores(run, bank_of(feature4=ROWS, avgpool=ROWS.square()))
    assert [(score.layer, score.metric) for score in found] == [
        *(("feature4", "rankme"), ("feature4", "stable_rank"), ("feature4", "alpha_req")),
        *(("avgpool", "rankme"), ("avgpool", "stable_rank"), ("avgpool", "alpha_req")),
    ]
    expected = []
    for rows in (ROWS, ROWS.square()):
        expected += [measure(rows) for measure in (rankme, stable_rank, alpha_req)]
    assert [score.value for score in found] == expected
    assert {score.n for score in found} == {60}
    assert "features of feature4 pooled as in 3.1" in found[0].details
    assert found[3].details == ("singular values of 60 images, evenly spaced over the split",)
    assert [(score.unit, score.higher_is_better, score.headline) for score in found[:3]] == [
        ("directions", None, True),
        ("directions", None, False),
        ("exponent", None, False),
    ]


def test_more_images_than_asked_for_are_taken_in_even_steps() -> None:
    found = scores(evaluation(("avgpool",), n_images=20), bank_of(avgpool=ROWS))
    assert found[0].value == rankme(ROWS[::3])
    assert {score.n for score in found} == {20}


def test_a_layer_of_few_directions_has_no_alpha_and_says_so() -> None:
    flat = ROWS[:, :3].contiguous()
    found = scores(evaluation(("avgpool",)), bank_of(avgpool=flat))
    assert [score.metric for score in found] == ["rankme", "stable_rank"]
    assert "no alpha-ReQ: features of 60 images span 3 directions" in " ".join(found[0].details)


@pytest.mark.parametrize(
    ("spoilt", "reason"), [(float("nan"), "1 of 720 features"), (None, "are zero")]
)
def test_features_without_directions_are_told_with_their_layer(
    spoilt: float | None, reason: str
) -> None:
    rows = torch.zeros_like(ROWS) if spoilt is None else ROWS.clone()
    if spoilt is not None:
        rows[5, 5] = spoilt
    with pytest.raises(
        UsageError, match=f"eval.label_free at feature5: .*{reason}.*batch_norm=recalibrated"
    ):
        scores(evaluation(("feature5",)), bank_of(feature5=rows))


PX = 64
LAYERS = ("feature2", "feature5", "avgpool")
WITH_ALL = LabelFree(
    layers=LAYERS,
    n_images=22,
    view=Center(short_px=PX, crop_px=PX),
    batch=5,
    lidar=Lidar(n_images=11, patches=4, patch_share=0.5),
    dse=Dse(n_images=16),
)


def live(folder: Path, broken: Sequence[int] = (), n: int = 24, grey: bool = False) -> MadeContext:
    """A context whose held-out images are files, some of them broken."""
    rng = np.random.default_rng(0)
    paths = []
    for index in range(n):
        pixels = rng.integers(256, size=(PX, PX, 3), dtype=np.uint8)
        # Coarse structure, as whole images of noise look alike to any network.
        pixels[: PX // 2] //= 1 + index % 4
        path = folder / f"{index}.png"
        Image.fromarray(pixels if not grey else np.full_like(pixels, 99)).save(path)
        if index in broken:
            path.write_bytes(b"no image")
        paths.append(str(path))
    images = FolderImages(name="noise", split="val", paths=paths, labels=[0] * n, classes=("a",))
    torch.manual_seed(0)
    backbone = SmallBackbone(widths=(8, 8, 8, 10, 12)).eval()
    made = context(backbone=backbone, seed=3)
    config = dataclasses.replace(made.encode_config, unreadable_share=0.5)
    source = LiveFeatures(backbone, images, config, WITH_ALL.view)
    return dataclasses.replace(made, held_out=source, encode_config=config)


def pixels_of(made: MadeContext, indices: Sequence[int]) -> Tensor:
    """Normalized images, read by Pillow alone."""
    assert isinstance(made.held_out, LiveFeatures)
    arrays = [np.asarray(made.held_out.images.read(index)) for index in indices]
    return ByDataset()(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float())


def values(found: Sequence[Score]) -> dict[tuple[str, str], float]:
    return {(score.layer, score.metric): score.value for score in found}


def test_one_reading_gives_what_each_measure_gives_by_itself(tmp_path: Path) -> None:
    made = live(tmp_path)
    found = values(list(WITH_ALL.run(made)))
    read = [24 * step // 22 for step in range(22)]
    with torch.no_grad():
        pooled = pooled_layers(made.backbone, pixels_of(made, read), LAYERS)
        of_dse = [read[22 * step // 16] for step in range(16)]
        maps = made.backbone(pixels_of(made, of_dse))
        of_lidar = [read[2 * step] for step in range(11)]
        scatter = ViewScatter()
        for index, image in zip(of_lidar, pixels_of(made, of_lidar), strict=True):
            generator = torch.Generator().manual_seed(seed_for(Use.LIDAR_PATCHES, 3, index))
            corners = torch.randint(PX // 2 + 1, (4, 2), generator=generator).tolist()
            patches = [image[:, top : top + 32, left : left + 32] for top, left in corners]
            means = made.backbone(torch.stack(patches))["feature5"].mean(dim=(2, 3))
            scatter.add(means[None])
    for layer in LAYERS:
        assert found[layer, "rankme"] == pytest.approx(rankme(pooled[layer]), rel=1e-4)
        assert found[layer, "stable_rank"] == pytest.approx(stable_rank(pooled[layer]), rel=1e-4)
        assert (layer, "dse") not in found or layer != "avgpool"
    assert found["feature5", "lidar"] == pytest.approx(scatter.lidar(), rel=1e-3)
    assert found["avgpool", "lidar"] == found["feature5", "lidar"]
    places = unit_places(maps["feature2"])
    alone = dense_structure(places, of_dse, seed=3, device=CPU)
    assert found["feature2", "dse"] == pytest.approx(alone.dse, rel=1e-3)
    assert found["feature2", "dse_between"] == pytest.approx(alone.between, rel=1e-3)


def test_the_table_has_all_rows_and_the_picture_a_panel_for_each_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(label_free_files, "save_png", spy_on_save(drawn))
    printed: list[str] = []
    folder = tmp_path / "of_this_model"
    made = dataclasses.replace(
        live(tmp_path), folder=folder, print_line=printed.append, checkpoint="runs/$a$/weights.pth"
    )
    # Layers in another order, which the picture does not take over
    found = list(dataclasses.replace(WITH_ALL, layers=LAYERS[::-1]).run(made))
    with open(folder / "label_free.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    read = [
        (line["layer"], line["metric"], float(line["value"]), line["unit"], int(line["n"]))
        for line in lines
    ]
    assert read == [
        (score.layer, score.metric, score.value, score.unit, score.n) for score in found
    ]
    names = {line["measure"] for line in lines if line["layer"] == "feature2"}
    measures = {"RankMe", "stable rank", "alpha-ReQ", "LiDAR", "DSE"}
    terms = {"between", "dimension", "within group", "within image"}
    assert names == measures | {f"DSE, {term}" for term in terms}

    with Image.open(folder / "label_free.png") as image:
        assert len(np.unique(np.asarray(image.convert("L")))) > 50  # not an empty sheet
    [figure] = drawn
    panels = {axis.get_title(loc="left").split(",")[0]: axis for axis in figure.axes}
    assert panels.keys() == measures | {"terms of DSE"}
    ticks = [label.get_text() for label in panels["LiDAR"].get_xticklabels()]
    assert ticks == list(LAYERS)
    line, *points = panels["DSE"].lines
    by_layer = [values(found).get((layer, "dse"), np.nan) for layer in LAYERS]
    assert np.array_equal(line.get_ydata(), by_layer, equal_nan=True)
    assert len({point.get_marker() for point in points}) == len(LAYERS)
    legend = panels["terms of DSE"].get_legend()
    assert {text.get_text() for text in legend.get_texts()} == terms
    assert figure.get_suptitle().endswith("of weights.pth")
    [told] = printed
    assert "3 layers" in told
    assert str(folder) in told


def spy_on_save(drawn: list[Figure]) -> Callable[[Figure, Path], None]:
    def save(figure: Figure, path: Path) -> None:
        drawn.append(figure)
        save_png(figure, path)

    return save


def test_without_a_measure_there_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        scores(evaluation(("feature5",)), bank_of(feature5=torch.zeros_like(ROWS)))
    assert not list(tmp_path.rglob("label_free.*"))


def test_rows_say_what_each_measure_compared(tmp_path: Path) -> None:
    found = list(WITH_ALL.run(live(tmp_path)))
    by_metric = {score.metric: score for score in found if score.layer == "feature2"}
    lidar, dse, term = by_metric["lidar"], by_metric["dse"], by_metric["dse_within_image"]
    assert (lidar.n, dse.n, by_metric["rankme"].n) == (11, 16, 22)
    assert {"3.17"} == {lidar.protocol, dse.protocol}
    assert "4 patches of 32 px" in lidar.details[0]
    assert "64 places" in dse.details[0]  # 8 x 8 of stride 8
    assert (dse.table, dse.column) == (by_metric["rankme"].table, "feature2")
    # Terms have a table with a column for each, so that nobody takes them for measures
    assert term.table not in ("", dse.table)
    assert (term.column, term.variant) == ("within image", "feature2")
    assert [score.metric for score in found if score.headline] == ["rankme"] * 3


def test_batches_change_nothing_and_the_spectra_are_those_of_features_alone(
    tmp_path: Path,
) -> None:
    made = live(tmp_path)
    found = values(list(WITH_ALL.run(made)))
    other = values(list(dataclasses.replace(WITH_ALL, batch=22).run(made)))
    assert found == pytest.approx(other, rel=1e-3)
    alone = dataclasses.replace(WITH_ALL, lidar=None, dse=None)
    for key, value in values(list(alone.run(made))).items():
        assert found[key] == value


def test_images_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    found = list(WITH_ALL.run(live(tmp_path, broken=(0, 5))))
    n_of = {score.metric: score.n for score in found}
    assert (n_of["rankme"], n_of["lidar"], n_of["dse"]) == (20, 10, 8)


def test_measures_that_features_do_not_define_say_why(tmp_path: Path) -> None:
    few = list(dataclasses.replace(WITH_ALL, n_images=6).run(live(tmp_path)))
    assert {score.metric for score in few} == {"rankme", "stable_rank", "alpha_req", "lidar"}
    assert "no DSE: 6 images" in " ".join(few[0].details)
    same = list(WITH_ALL.run(live(tmp_path, grey=True)))
    # One place of the map of feature5
    reasons = " ".join(same[-2].details)
    assert "no LiDAR" in reasons
    assert "no alpha-ReQ" in reasons
    assert {score.metric for score in same if score.layer == "avgpool"} == {
        "rankme",
        "stable_rank",
    }


def test_kept_features_have_no_images() -> None:
    with pytest.raises(TypeError, match="Bank"):
        scores(dataclasses.replace(evaluation(), dse=Dse(n_images=8)), bank_of(feature4=ROWS))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: Lidar(n_images=1, patches=2, patch_share=0.5), "lidar.n_images is 1"),
        (lambda: Lidar(n_images=2, patches=1, patch_share=0.5), "lidar.patches is 1"),
        (lambda: Lidar(n_images=2, patches=2, patch_share=1.5), "lidar.patch_share is 1.5"),
        (lambda: Dse(n_images=7), "dse.n_images is 7"),
    ],
)
def test_wrong_constants_of_a_measure_are_refused(made, message: str) -> None:
    with pytest.raises(UsageError, match=f"eval.label_free.{message}"):
        made()


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("layers", ("feature9",), "eval.label_free.layers is .*feature9"),
        ("layers", "feature1", "eval.label_free.layers is feature1: "),
        ("n_images", 1, "eval.label_free.n_images is 1: "),
        ("n_images", 20.5, "eval.label_free.n_images is 20.5: "),
        ("batch", 0, "eval.label_free.batch is 0: "),
    ],
)
def test_wrong_constants_are_refused(setting: str, value: object, message: str) -> None:
    made = evaluation()
    object.__setattr__(made, setting, value)  # the type checker of tests would be first
    with pytest.raises(ValueError, match=message):
        made.__post_init__()
