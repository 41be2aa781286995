"""Tests the numbers that monitors measure, and that training does not notice them."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from relloc.data.crops import Crops
from relloc.data.folder import FolderImages
from relloc.data.image_set import Splits
from relloc.data.loader import collate
from relloc.data.views import Center
from relloc.errors import DataError
from relloc.features.pool import pooled_layers
from relloc.features.source import EncodeConfig
from relloc.features.spectrum import alpha_req, rankme
from relloc.features.voting import vote
from relloc.geometry import PatchGrid
from relloc.models.pair_head import PairHead
from relloc.models.small import SmallBackbone
from relloc.patches.color import Drop
from relloc.patches.normalize import ByDataset
from relloc.patches.pipeline import PatchPipeline
from relloc.pretext.held_out import accuracy, count_hits, predict_positions
from relloc.pretext.questions import CENTER_PAIRS, POSITIONS, AllPairs, Questions, head_sizes
from relloc.pretext.relative_location import RelativeLocation, about_center
from relloc.results import LAYERS
from relloc.runs.monitors import Monitors, confusion_picture
from relloc.seeds import Use, seed_for

CPU = torch.device("cpu")
PX = 64
PATCHES = PatchPipeline(
    grid=PatchGrid(patch_px=16, gap_px=2, jitter_px=2, resize=None),
    color=Drop(noise="gaussian"),
    normalize=ByDataset(),
)
VIEW = Center(short_px=PX, crop_px=PX)
CONFIG = EncodeConfig(batch=8, workers=0, device=CPU, precision="fp32", unreadable_share=0)
N_TRAIN, N_HELD_OUT = 30, 20
CLASSES = ("blue", "green", "red")


def write_images(folder: Path, split: str, n: int) -> FolderImages:
    """Noise with a little more of the color of the class."""
    chance = np.random.default_rng(len(split))
    paths = []
    for place in range(n):
        pixels = chance.normal(100, 40, size=(PX, PX, 3)) + chance.normal(0, 8, size=3)
        pixels[..., 2 - place % 3] += 12
        paths.append(str(folder / f"{split}{place}.png"))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(paths[-1])
    labels = [place % 3 for place in range(n)]
    return FolderImages(name="colors", split=split, paths=paths, labels=labels, classes=CLASSES)


@pytest.fixture
def data(tmp_path: Path) -> Splits:
    return Splits(
        train=write_images(tmp_path, "train", N_TRAIN),
        held_out=write_images(tmp_path, "val", N_HELD_OUT),
    )


def new_model(
    *, one_pass: bool = False, questions: Questions = CENTER_PAIRS, batch_norm: str = "separate"
) -> RelativeLocation:
    torch.manual_seed(0)
    head = PairHead(
        embedding_dim=8,
        hidden_dim=16,
        batch_norm_momentum=0.1,
        dropout=0.5,
        neck_std=0.5,
        head_std=0.5,
        **head_sizes(questions),
    )
    backbone = SmallBackbone(widths=(8, 8, 8, 10, 8))
    return RelativeLocation(
        backbone,
        head,
        questions=questions,
        batch_norm=batch_norm,  # type: ignore[arg-type]
        images_per_batch_norm=4,
        one_pass=one_pass,
    )


@pytest.fixture
def model() -> RelativeLocation:
    """Batch norm has seen patches, so that its statistics are not those of a new network."""
    fresh = new_model()
    fresh(torch.randn(32, 9, 3, 16, 16, generator=torch.Generator().manual_seed(1)))
    return fresh


def monitors(model: RelativeLocation, data: Splits, folder: Path, **changes: object) -> Monitors:
    settings = {
        "patches": PATCHES,
        "config": CONFIG,
        "view": VIEW,
        "n_images": 15,
        "k": 5,
        "seed": 3,
    }
    settings["folder"] = folder
    return Monitors(model=model, data=data, **{**settings, **changes})  # type: ignore[arg-type]


HELD_OUT_PLACES = [0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 16, 17, 18]  # 15 of 20
TRAIN_PLACES = list(range(0, 30, 2))  # 15 of 30


def features_of(
    model: RelativeLocation, images: FolderImages, places: list[int]
) -> dict[str, Tensor]:
    (views,) = CONFIG.views(images, VIEW, [(place, 0) for place in places], len(places))
    with torch.no_grad():
        return pooled_layers(
            copy.deepcopy(model).eval().backbone, CONFIG.to_device(views.pixels), LAYERS
        )


def test_pretext_values_are_the_accuracy_on_evenly_spaced_center_crops(
    model: RelativeLocation, data: Splits, tmp_path: Path
) -> None:
    values = monitors(model, data, tmp_path)(7)
    crops = Crops(data.held_out, PATCHES.grid, use=Use.HELD_OUT_CROP, seed=3, centered=True)
    pixels = collate([crops[(place,)] for place in HELD_OUT_PLACES]).pixels
    given = predict_positions(
        model, pixels.split(CONFIG.batch), PATCHES, seed=3, device=CPU, bf16=False
    )
    expected = accuracy(count_hits(given), [str(place) for place in HELD_OUT_PLACES])
    assert values["monitor/pretext/top1"] == pytest.approx(expected.percent)
    assert 0 < expected.percent < 100
    by_position = [values[f"monitor/pretext/top1_{position}"] for position in POSITIONS]
    assert by_position == pytest.approx(
        [100 * float((given[:, label] == label).float().mean()) for label in range(8)], rel=1e-5
    )
    assert np.mean(by_position) == pytest.approx(expected.percent, rel=1e-5)


def test_a_network_of_other_pairs_is_measured_on_these_and_on_those_with_the_center(
    data: Splits, tmp_path: Path
) -> None:
    model = new_model(questions=AllPairs(), batch_norm="joint")
    values = monitors(model, data, tmp_path)(7)
    crops = Crops(data.held_out, PATCHES.grid, use=Use.HELD_OUT_CROP, seed=3, centered=True)
    pixels = collate([crops[(place,)] for place in HELD_OUT_PLACES]).pixels
    of_trained, of_center = [], []
    for asked, found in ((model, of_trained), (about_center(model), of_center)):
        generator = torch.Generator().manual_seed(seed_for(Use.HELD_OUT_PATCHES, 3))
        # In the batches of the monitors, since one generator makes the patches of all
        for some in pixels.split(CONFIG.batch):
            with torch.no_grad():
                found.append(asked.eval()(PATCHES(some, generator)).argmax(dim=2))
    labels = torch.tensor(AllPairs().labels)
    right = (torch.cat(of_trained) == labels).float()
    assert values["monitor/pretext/top1_trained"] == pytest.approx(100 * right.mean().item())
    right = (torch.cat(of_center) == torch.arange(8)).float()
    assert values["monitor/pretext/top1"] == pytest.approx(100 * right.mean().item())
    assert values["monitor/pretext/top1"] != values["monitor/pretext/top1_trained"]


def test_spectra_are_those_of_held_out_views(
    model: RelativeLocation, data: Splits, tmp_path: Path
) -> None:
    values = monitors(model, data, tmp_path)(7)
    features = features_of(model, data.held_out, HELD_OUT_PLACES)
    for layer in ("feature4", "feature5", "avgpool"):
        assert values[f"monitor/rankme/{layer}"] == pytest.approx(rankme(features[layer]), rel=1e-4)
        assert values[f"monitor/alpha_req/{layer}"] == pytest.approx(
            alpha_req(features[layer]), rel=1e-3
        )


@pytest.mark.parametrize(("n_images", "k"), [(15, 5), (100, 40)])
def test_knn_is_the_vote_of_training_views(
    model: RelativeLocation, data: Splits, tmp_path: Path, n_images: int, k: int
) -> None:
    values = monitors(model, data, tmp_path, n_images=n_images, k=k)(7)
    places, bank_places = HELD_OUT_PLACES, TRAIN_PLACES
    if n_images == 100:
        places, bank_places = list(range(N_HELD_OUT)), list(range(N_TRAIN))
    k = min(k, len(bank_places))
    queries, bank = (
        features_of(model, images, chosen)
        for images, chosen in ((data.held_out, places), (data.train, bank_places))
    )
    truth, known = (
        torch.tensor([place % 3 for place in chosen]) for chosen in (places, bank_places)
    )
    for layer in LAYERS:
        found = vote(queries[layer], bank[layer], known, k=[k], temperature=0.07, n_classes=3)[k]
        assert values[f"monitor/knn/{layer}/top1_k{k}"] == pytest.approx(
            100 * float((found == truth).float().mean())
        )
    assert sum(name.startswith("monitor/knn/") for name in values) == len(LAYERS)


def test_names_are_those_of_what_can_be_asked(
    model: RelativeLocation, data: Splits, tmp_path: Path
) -> None:
    unlabeled = FolderImages(name="colors", split="train", paths=data.train.paths)
    labeled, not_labeled = (
        set(monitors(model, splits, tmp_path)(0))
        for splits in (data, Splits(train=unlabeled, held_out=data.held_out))
    )
    always = {
        "monitor/pretext/top1",
        *(f"monitor/pretext/top1_{position}" for position in POSITIONS),
    }
    for layer in ("feature4", "feature5", "avgpool"):
        always |= {f"monitor/rankme/{layer}", f"monitor/alpha_req/{layer}"}
    assert not_labeled == always
    assert labeled == always | {f"monitor/knn/{layer}/top1_k5" for layer in LAYERS}


def test_a_second_call_reads_no_image_and_gives_the_same(
    model: RelativeLocation, data: Splits, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    watch = monitors(model, data, run)
    first = watch(10)
    for path in (*data.train.paths, *data.held_out.paths):
        Path(path).unlink()
    assert watch(20) == first
    assert [path.relative_to(run) for path in sorted(run.rglob("*.png"))] == [
        Path(confusion_picture(step)) for step in (10, 20)
    ]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_call_leaves_no_trace(
    model: RelativeLocation, data: Splits, tmp_path: Path, workers: int
) -> None:
    config = EncodeConfig(**{**vars(CONFIG), "workers": workers})
    model.train()
    model.backbone.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    weights, chance = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    monitors(model, data, tmp_path, config=config)(1)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(value.grad is None for value in model.parameters())
    assert torch.equal(torch.get_rng_state(), chance)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("one_pass", [False, True])
def test_training_with_monitors_gives_the_weights_of_training_without(
    data: Splits, tmp_path: Path, one_pass: bool
) -> None:
    crops = Crops(data.train, PATCHES.grid, use=Use.CROP, seed=0, centered=False)
    pixels = collate([crops[place, place] for place in range(8)]).pixels

    def trained(watched: bool) -> dict[str, Tensor]:
        model = new_model(one_pass=one_pass)
        watch = monitors(model, data, tmp_path, n_images=6)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(2):
            # The seed comes from the global generator, so that one moved by monitors is noticed.
            drawn_seed = int(torch.randint(1000, ()))
            generator = torch.Generator().manual_seed(drawn_seed)
            kept = model.head.draw_dropout_mask(len(pixels), generator)
            optimizer.zero_grad()
            drawn = PATCHES.draw(len(pixels), generator)
            logits = model(PATCHES.make(pixels, *drawn), kept)
            CENTER_PAIRS.loss(logits, CENTER_PAIRS.truth(*drawn)).backward()
            optimizer.step()
            if watched:
                watch(step + 1)
        return model.state_dict()

    plain, watched = trained(False), trained(True)
    assert plain.keys() == watched.keys()
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert not torch.equal(
        plain["head.answer.weight"], new_model().state_dict()["head.answer.weight"]
    )


def test_images_that_can_not_be_read_are_left_out(
    model: RelativeLocation, data: Splits, tmp_path: Path
) -> None:
    Path(data.held_out.paths[4]).write_bytes(b"no image")
    Path(data.train.paths[0]).write_bytes(b"no image")
    values = monitors(model, data, tmp_path)(1)
    places, bank_places = [place for place in HELD_OUT_PLACES if place != 4], TRAIN_PLACES[1:]
    queries = features_of(model, data.held_out, places)["avgpool"]
    bank = features_of(model, data.train, bank_places)["avgpool"]
    truth, known = (
        torch.tensor([place % 3 for place in chosen]) for chosen in (places, bank_places)
    )
    found = vote(queries, bank, known, k=[5], temperature=0.07, n_classes=3)[5]
    assert values["monitor/rankme/avgpool"] == pytest.approx(rankme(queries), rel=1e-4)
    assert values["monitor/knn/avgpool/top1_k5"] == pytest.approx(
        100 * float((found == truth).float().mean())
    )


def test_no_usable_image_at_all_is_an_error_that_names_one(
    model: RelativeLocation, data: Splits, tmp_path: Path
) -> None:
    for path in data.held_out.paths:
        Path(path).write_bytes(b"no image")
    with pytest.raises(
        DataError,
        match=r"\b15 images .*\bcolors val\b.*\bval0\.png: ",
    ):
        monitors(model, data, tmp_path)(1)


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_a_network_that_collapsed_or_diverged_has_spectra_that_are_not_defined(
    model: RelativeLocation, data: Splits, tmp_path: Path, value: float
) -> None:
    for weight in model.backbone.parameters():
        weight.data.fill_(value)
    values = monitors(model, data, tmp_path)(1)
    undefined = ("rankme", "alpha_req", "knn") if math.isnan(value) else ("rankme", "alpha_req")
    assert all(
        math.isnan(number) == any(word in name for word in undefined)
        for name, number in values.items()
    )
