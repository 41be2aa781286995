"""`model=resnet50 data=in1k` is the published recipe, that of mmselfsup (protocols.md 1.1, 2.1)."""

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from torch import nn

from relloc.data.order import StepPlan
from relloc.data.views import RandomCrop, RandomResized, View
from relloc.features.augment import JitterAndLighting
from relloc.pretext.relative_location import RelativeLocation
from relloc.reports.published import card_parts
from relloc.runs import build
from relloc.runs.command_settings import Pretraining


@pytest.fixture(
    scope="module",
    params=[["model=resnet50", "data=in1k"], ["experiment=card2022"]],
    ids=["words", "preset"],
)
def card(request, compose):
    return compose("train", request.param)


@pytest.fixture(scope="module")
def settings(card) -> Pretraining:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RELLOC_DATA", "/nowhere")
        return build.pretraining(card)


@pytest.fixture(scope="module")
def model(settings) -> RelativeLocation:
    return settings.network()


@pytest.mark.parametrize(
    ("key", "published"),
    [
        ("grid.resize.px", 292),
        ("grid.patch_px", 64),
        ("color.p", 0.66),
        ("color.weights", "luma"),
        ("normalize._target_", "relloc.patches.normalize.ByDataset"),
        ("model.head.hidden_dim", 4096),
        ("model.head.batch_norm_momentum", 0.003),
        ("model.head.dropout", 0.5),
        ("model.head.neck_std", 0.01),
        ("model.head.head_std", 0.005),
        ("optimizer.lr", 0.2),
        ("optimizer.momentum", 0.9),
        ("optimizer.weight_decay", 1e-4),
        ("optimizer.head_weight_decay", 5e-4),
        ("schedule.epochs", 70),
        ("schedule.warmup_epochs", 5),
        ("schedule.warmup_from", 0.1),
        ("schedule.milestone_epochs", [30, 50]),
        ("schedule.gamma", 0.1),
        ("recipe.images_per_step", 512),
        ("recipe.images_per_batch_norm", 64),
        ("pretext_batch_norm", "separate"),
        ("view.short_px", 256),
        ("view.crop_px", 224),
        ("batch_norm", "as_trained"),
    ],
)
def test_setting(card, key, published):
    node = card
    for name in key.split("."):
        node = node[name]
    assert node == published


@pytest.fixture(scope="module")
def evaluations(compose):
    return compose(
        "evaluate",
        ["checkpoint=random", "model=resnet50", "eval=[card_classification,linear_inat18]"],
    ).eval


STAGES = ["feature1", "feature2", "feature3", "feature4", "feature5"]
LINEAR = {
    "lr": 0.01,
    "weight_decay": 1e-4,
    "momentum": 0.9,
    "nesterov": True,
    "batch": 256,
    "gamma": 0.1,
}
LINEAR |= {"batch_norm": True, "layers": STAGES}
COSTS = [0.5**power for power in range(19, 3, -1)] + [1, 10, 100]
TUNED = {
    "epochs": 20,
    "milestone_epochs": [12, 16],
    "gamma": 0.2,
    "momentum": 0.9,
    "batch": 256,
    "list_file": None,
}
TUNED |= {"learning_rates": [0.001, 0.01, 0.1], "head_multipliers": [1, 10, 100]}


@pytest.mark.parametrize(
    ("name", "constants", "data"),
    [
        ("voc07_svm", {"costs": COSTS, "folds": 3, "layers": STAGES}, "voc2007"),
        (
            "voc07_low_shot",
            {"costs": COSTS, "draws": 5, "shots": [1, 2, 4, 8, 16, 32, 64, 96], "layers": STAGES},
            "voc2007",
        ),
        ("linear_in1k", {**LINEAR, "epochs": 90, "milestone_epochs": [30, 60]}, "in1k"),
        (
            "linear_places205",
            {**LINEAR, "epochs": 28, "milestone_epochs": [7, 14, 21]},
            "places205",
        ),
        ("linear_inat18", {**LINEAR, "epochs": 84, "milestone_epochs": [24, 48, 72]}, "inat18"),
        (
            "linear_avgpool",
            {
                "lr": 30,
                "weight_decay": 0,
                "momentum": 0.9,
                "nesterov": False,
                "epochs": 100,
                "milestone_epochs": [60, 80],
                "gamma": 0.1,
                "batch_norm": False,
                "batch": 256,
                "layers": ["avgpool"],
                "best_epoch": True,
            },
            "in1k",
        ),
        ("knn_in1k", {"k": [10, 20, 100, 200], "temperature": 0.07, "layers": ["avgpool"]}, "in1k"),
        ("semisup_1", {**TUNED, "share": 0.01, "weight_decay": 5e-4}, "in1k"),
        ("semisup_10", {**TUNED, "share": 0.1, "weight_decay": 1e-4}, "in1k"),
    ],
)
def test_evaluations_have_the_published_constants(evaluations, name, constants, data):
    """protocols.md 3.1 to 3.7; semi-supervised: OpenSelfSup's configs."""
    node = evaluations[name]
    assert {key: node[key] for key in constants} == constants
    assert node.data.name == data


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("voc07_svm", {"trainval": 5011, "test": 4952}),
        ("voc07_low_shot", {"trainval": 5011, "test": 4952}),
        ("linear_in1k", {"train": 1_281_167, "val": 50_000}),
        ("linear_places205", {"train": 2_448_873, "val": 20_500}),
        ("linear_inat18", {"train": 437_513, "val": 24_426}),
    ],
)
def test_data_sets_are_known_by_their_published_counts(evaluations, name, published):
    """protocols.md 3."""
    assert evaluations[name].data.source.published_images == published


def test_imagenet_says_where_to_get_it(evaluations, tmp_path):
    with pytest.raises(InstantiationException, match=r"data\.root .*ImageNet .*ImageNet site"):
        instantiate({**evaluations.linear_in1k.data.source, "root": str(tmp_path)})


def test_voc_is_trained_on_trainval_and_tested_on_test(evaluations):
    for name in ("voc07_svm", "voc07_low_shot"):
        source = evaluations[name].data.source
        assert (source.year, source.train, source.held_out) == (2007, "trainval", "test")


def test_a_grid_stands_beside_the_published_rate_and_spans_it(evaluations):
    """Ours: a checkpoint is not held to a rate that was best for another one."""
    for name, most in (
        ("linear_in1k", 50),
        ("linear_places205", 50),
        ("linear_inat18", 50),
        ("linear_avgpool", 18),
    ):
        node = evaluations[name]
        assert len(node.grid_lrs) * len(node.grid_weight_decays) * len(node.layers) == most
        assert min(node.grid_lrs) < node.lr < max(node.grid_lrs)
        assert node.lr in node.grid_lrs
        assert node.weight_decay in node.grid_weight_decays
    assert evaluations.linear_in1k.grid_lrs == [0.003, 0.01, 0.03, 0.1, 0.3]
    assert evaluations.linear_in1k.grid_weight_decays == [1e-4, 1e-3]
    assert evaluations.linear_avgpool.grid_lrs == [0.3, 1, 3, 10, 30, 100]
    assert evaluations.linear_avgpool.grid_weight_decays == [0, 1e-6, 1e-5]


def test_the_table_of_the_card_says_which_evaluations_may_decode_on_the_device(compose):
    chosen = compose("evaluate", ["checkpoint=random", "model=resnet50", "eval=card"]).eval
    parts = [part for part in card_parts() if part.evaluation in chosen]
    assert len(parts) > 10
    for part in parts:
        evaluation = get_class(chosen[part.evaluation]["_target_"])
        assert part.may_decode_on_device == evaluation.may_decode_on_device


def test_evaluations_see_images_as_published(evaluations):
    for name in ("voc07_svm", "voc07_low_shot"):
        assert evaluations[name].view == {
            "_target_": "relloc.data.views.Squash",
            "short_px": 256,
            "side_px": 224,
        }
    center = {"_target_": "relloc.data.views.Center", "short_px": 256, "crop_px": 224}
    resized = RandomResized(
        crop_px=224, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5
    )  # torchvision's
    crops: dict[str, View] = dict.fromkeys(
        ("linear_in1k", "linear_inat18", "linear_avgpool", "semisup_1", "semisup_10"), resized
    )
    crops["linear_places205"] = RandomCrop(short_px=256, crop_px=224, flip=0.5)
    for name, crop in crops.items():
        assert evaluations[name].view == center
        assert instantiate(evaluations[name].augment) == crop
    assert evaluations.knn_in1k.view == center


def test_one_evaluation_changes_colors_and_as_published(evaluations):
    """protocols.md 3.3: jitter without hue, and lighting noise."""
    colored = [name for name in evaluations if evaluations[name].get("color")]
    assert colored == ["linear_in1k"]
    published = JitterAndLighting(brightness=0.4, contrast=0.4, saturation=0.4, lighting=0.1)
    assert instantiate(evaluations.linear_in1k.color) == published


def test_crop_is_255_of_three_cells_of_85_with_a_random_64_px_crop_in_each(card):
    grid = instantiate(card.grid, _convert_="all")
    assert grid.span_px == 255
    assert grid.pitch_px == 85
    assert [grid.lowest_corner(cell)[1] for cell in range(3)] == [0, 85, 170]
    assert grid.jitter_range == (0, 85 - 64)


def test_network_and_initialization(model):
    neck, norm, _ = model.head.neck
    assert (neck.in_features, neck.out_features) == (2 * 2048, 4096)
    assert (norm.num_features, norm.momentum, norm.affine) == (4096, 0.003, True)
    assert model.head.dropout == 0.5
    assert (model.head.answer.in_features, model.head.answer.out_features) == (4096, 8)
    assert neck.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert model.head.answer.weight.std().item() == pytest.approx(0.005, rel=0.03)
    assert not neck.bias.any()
    assert not model.head.answer.bias.any()
    convolutions = [module for module in model.backbone.modules() if isinstance(module, nn.Conv2d)]
    for convolution in convolutions:
        fan_out = convolution.out_channels * convolution.kernel_size[0] ** 2
        assert convolution.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.08)
    last_norms = [
        block.bn3 for layer in (model.backbone.layer1, model.backbone.layer4) for block in layer
    ]
    assert all(
        torch.equal(norm.weight, torch.ones_like(norm.weight)) for norm in last_norms
    )  # zero_init_residual off


def test_optimizer_rates_and_decays_are_the_published_ones(settings, model):
    optimizer = settings.make_optimizer(model=model)
    trunk, head = optimizer.param_groups
    assert (trunk["lr"], trunk["momentum"], trunk["weight_decay"], trunk["nesterov"]) == (
        0.2,
        0.9,
        1e-4,
        False,
    )
    assert (head["lr"], head["weight_decay"]) == (0.2, 5e-4)
    assert len(head["params"]) == len(
        list(model.head.parameters())
    )  # biases and batch norm decay as well


def test_rates_over_the_run(card):
    schedule = instantiate(card.schedule, _convert_="all")
    rates = {epoch: 0.2 * schedule.factor(epoch) for epoch in (0, 2.5, 5, 29.99, 30, 50, 69.9)}
    assert rates == pytest.approx(
        {0: 0.02, 2.5: 0.11, 5: 0.2, 29.99: 0.2, 30: 0.02, 50: 0.002, 69.9: 0.002}
    )


def neighbors_of(card):
    return card.eval.get("knn_in1k", card.eval.get("knn"))


def test_neighbors_are_asked_as_published(card):
    knn = neighbors_of(card)
    assert (knn.k, knn.temperature) == ([10, 20, 100, 200], 0.07)


def test_the_bank_of_imagenet_fits_where_knn_needs_it(card):
    knn = neighbors_of(card)
    assert list(knn.layers) == ["avgpool"]
    assert knn.bank_gib > 1_281_167 * 2048 * 4 / 2**30


@pytest.mark.parametrize(("world", "accumulation"), [(8, 1), (1, 8)])
def test_one_epoch_has_2502_steps_on_eight_gpus_and_on_one(card, world, accumulation):
    plan = StepPlan(
        n_images=1_281_167,
        images_per_step=card.recipe.images_per_step,
        images_per_batch_norm=card.recipe.images_per_batch_norm,
        images_per_forward=64,
        world=world,
    )
    assert (plan.steps_per_epoch, plan.accumulation) == (2502, accumulation)
