import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from commands import start
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from relloc.errors import UsageError
from relloc.geometry import OFFSETS
from relloc.models.backbone import Backbone
from relloc.models.pair_head import PairHead
from relloc.models.resnet import ResNetBackbone
from relloc.models.small import SmallBackbone
from relloc.pretext.questions import (
    ARRANGEMENTS,
    CENTER_PAIRS,
    AdjacentPairs,
    AllPairs,
    Questions,
    Triplets,
    head_sizes,
    without_center,
)
from relloc.pretext.relative_location import RelativeLocation, about_center

BACKBONES: dict[str, Callable[[], Backbone]] = {
    "small": lambda: SmallBackbone(widths=(8, 8, 10, 12, 14)),
    "resnet18": lambda: ResNetBackbone(depth=18),
}
NEIGHBOR_CELLS = (0, 1, 2, 3, 5, 6, 7, 8)
every_backbone = pytest.mark.parametrize(
    "kind", ["small", pytest.param("resnet18", marks=pytest.mark.slow)]
)


def model_of(
    kind: str,
    batch_norm: str = "separate",
    *,
    images: int = 3,
    one_pass: bool = False,
    questions: Questions = CENTER_PAIRS,
    **head_changes: object,
) -> RelativeLocation:
    torch.manual_seed(0)
    backbone = BACKBONES[kind]()
    settings: dict[str, object] = {
        "hidden_dim": 16,
        "batch_norm_momentum": 0.1,
        "dropout": 0.0,
        "neck_std": 0.3,
        "head_std": 0.3,
    }
    settings |= head_sizes(questions) | head_changes
    head = PairHead(embedding_dim=backbone.embedding_dim, **settings)  # type: ignore[arg-type]
    return RelativeLocation(
        backbone,
        head,
        questions=questions,
        batch_norm=batch_norm,  # type: ignore[arg-type]
        images_per_batch_norm=images,
        one_pass=one_pass,
    ).double()


def patches_of(b: int = 3) -> Tensor:
    return torch.randn(
        b, 9, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


def loss_of(logits: Tensor, questions: Questions = CENTER_PAIRS) -> Tensor:
    corners = torch.zeros(len(logits), questions.n_cells, 2, dtype=torch.int64)
    return questions.loss(logits, questions.truth(corners))


def loss_with_every_center_encoded_eight_times(model: RelativeLocation, patches: Tensor) -> Tensor:
    """The published way (mmselfsup): eight pairs an image, neighbors and centers in two calls."""
    pairs = [
        (image[cell], image[4], label)
        for image in patches
        for label, cell in enumerate(NEIGHBOR_CELLS)
    ]
    neighbors = model.backbone.embed(torch.stack([neighbor for neighbor, _, _ in pairs]))
    centers = model.backbone.embed(torch.stack([center for _, center, _ in pairs]))
    hidden = model.head.neck(torch.cat([neighbors, centers], dim=1))
    right = torch.tensor([label for _, _, label in pairs])
    return cross_entropy(model.head.answer(hidden), right)


def norms_of(model: RelativeLocation) -> dict[str, nn.BatchNorm2d]:
    return {name: m for name, m in model.backbone.named_modules() if isinstance(m, nn.BatchNorm2d)}


@every_backbone
def test_encoding_the_center_once_gives_loss_and_gradients_of_encoding_it_eight_times(
    kind: str,
) -> None:
    ours, twin = model_of(kind).train(), model_of(kind).train()
    patches = patches_of()
    loss = loss_of(ours(patches))
    expected = loss_with_every_center_encoded_eight_times(twin, patches)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-7)
    for (name, value), other in zip(ours.named_parameters(), twin.parameters(), strict=True):
        assert value.grad is not None, name
        assert value.grad.abs().max() > 0, name
        torch.testing.assert_close(value.grad, other.grad, rtol=1e-9, atol=1e-11, msg=name)


@every_backbone
def test_running_means_equal_the_published_and_variances_differ_by_bessels_factor_alone(
    kind: str,
) -> None:
    ours, twin = model_of(kind).train(), model_of(kind).train()
    values: dict[str, int] = {}
    for name, norm in norms_of(ours).items():
        norm.register_forward_hook(
            lambda _module, inputs, _output, name=name: values.update(
                {name: inputs[0].numel() // inputs[0].shape[1]}
            )
        )
    momentum = 0.1
    ours(patches_of())
    loss_with_every_center_encoded_eight_times(twin, patches_of())
    last_only = copy.deepcopy(ours).apply(lambda module: setattr(module, "momentum", 1.0))
    last_only(
        patches_of()
    )  # with momentum 1 the statistics are those of the last group, the centers
    for name, norm in norms_of(ours).items():
        other, m = norms_of(twin)[name], values[name]
        torch.testing.assert_close(norm.running_mean, other.running_mean, rtol=1e-10, atol=1e-12)
        of_centers = norms_of(last_only)[name].running_var
        without_neighbors_part = norm.running_var - momentum * of_centers
        corrected = without_neighbors_part + momentum * of_centers / ((m - 1 / 8) / (m - 1))
        torch.testing.assert_close(other.running_var, corrected, rtol=1e-10, atol=1e-12)
        assert norm.num_batches_tracked == other.num_batches_tracked == 2


@every_backbone
def test_joint_is_one_pass_over_all_nine_patches_and_another_thing_than_separate(kind: str) -> None:
    joint, plain, separate = (
        model_of(kind, "joint").train(),
        model_of(kind).train(),
        model_of(kind).train(),
    )
    patches = patches_of()
    embedded = plain.backbone.embed(patches.reshape(-1, 3, 32, 32)).reshape(len(patches), 9, -1)
    pairs = [torch.cat([image[cell], image[4]]) for image in embedded for cell in NEIGHBOR_CELLS]
    expected = plain.head.answer(plain.head.neck(torch.stack(pairs))).reshape(-1, 8, 8)
    logits = joint(patches)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-12)
    for name, norm in norms_of(joint).items():
        torch.testing.assert_close(
            norm.running_var, norms_of(plain)[name].running_var, rtol=1e-10, atol=1e-12
        )
        assert norm.num_batches_tracked == 1
    assert not torch.allclose(logits, separate(patches), rtol=1e-3)


@every_backbone
@pytest.mark.parametrize(
    ("batch_norm", "questions"),
    [
        ("separate", CENTER_PAIRS),
        ("joint", CENTER_PAIRS),
        ("cell", CENTER_PAIRS),
        ("cell", AllPairs()),
        ("joint", Triplets()),
    ],
)
def test_one_pass_over_all_ghost_batches_is_one_pass_over_each(
    kind: str, batch_norm: str, questions: Questions
) -> None:
    asked: dict[str, Any] = {"questions": questions}
    together = model_of(kind, batch_norm, images=3, one_pass=True, dropout=0.5, **asked).train()
    apart = model_of(kind, batch_norm, images=3, dropout=0.5, **asked).train()
    patches = patches_of(b=6)
    mask = apart.head.draw_dropout_mask(6, torch.Generator().manual_seed(4))
    for model in (together, apart):
        loss_of(model(patches, mask), questions).backward()
    for (name, value), other in zip(together.named_parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(value.grad, other.grad, rtol=1e-7, atol=1e-9, msg=name)
    assert list(together.state_dict()) == list(apart.state_dict())
    for (
        name,
        value,
    ) in together.state_dict().items():  # running statistics too: group by group, in order
        torch.testing.assert_close(
            value, apart.state_dict()[name], rtol=1e-10, atol=1e-12, msg=name
        )
    whole = model_of(kind, batch_norm, images=6, one_pass=True, **asked).train()
    assert not torch.allclose(whole(patches), together(patches), rtol=1e-3)


def test_the_head_sees_the_three_patches_of_a_triplet_side_by_side() -> None:
    model = model_of("small", "joint", questions=Triplets()).eval()
    patches = patches_of()
    embedded = model.backbone.embed(patches.flatten(0, 1)).unflatten(0, (-1, 9))
    outer = without_center(embedded, dim=1)
    triplets = [
        torch.cat([outer[:, first], embedded[:, 4], outer[:, second]], dim=1)
        for first, second in ARRANGEMENTS
    ]
    rows = torch.stack(triplets, dim=1)
    logits = model.head.answer(model.head.neck(rows.flatten(0, 1))).unflatten(0, (-1, 20))
    torch.testing.assert_close(model(patches), logits)


def cells_of_pairs(questions: Questions) -> list[tuple[int, int]]:
    """The cells of each question in the order of the outputs, neighbor first."""
    numbers = torch.arange(float(questions.n_cells)).reshape(1, -1, 1)
    neighbors, centers = questions.select(numbers)
    asked = questions.combine([neighbors, 100 * centers]).flatten().tolist()
    return [(int(number) % 100, int(number) // 100) for number in asked]


@pytest.mark.parametrize("batch_norm", ["joint", "cell"])
@pytest.mark.parametrize("questions", [AdjacentPairs(), AllPairs()], ids=["adjacent", "offsets"])
def test_projecting_each_patch_twice_is_one_product_for_each_pair(
    questions: Questions, batch_norm: str
) -> None:
    """The published form: the head's first layer on the two embeddings side by side."""
    model = model_of("small", batch_norm, questions=questions).train()
    twin = model_of("small", batch_norm, questions=questions).train()
    patches = patches_of()
    loss_of(model(patches), questions).backward()
    of_cells = [patches.flatten(0, 1)]
    if batch_norm == "cell":
        of_cells = [patches[:, cell] for cell in range(9)]
    embedded = [twin.backbone.embed(rows) for rows in of_cells]
    if batch_norm == "joint":
        by_cell = embedded[0].unflatten(0, (-1, 9)).unbind(1)
    else:
        by_cell = tuple(embedded)
    pairs = [
        torch.cat([by_cell[neighbor], by_cell[center]], dim=1)
        for neighbor, center in cells_of_pairs(questions)
    ]
    rows = torch.stack(pairs, dim=1).flatten(0, 1)
    logits = twin.head.answer(twin.head.neck(rows)).unflatten(0, (len(patches), -1))
    loss_of(logits, questions).backward()
    for (name, value), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(value.grad, other.grad, rtol=1e-7, atol=1e-10, msg=name)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name], rtol=1e-10, atol=1e-12, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("batch_norm", ["joint", "cell"])
@pytest.mark.parametrize(
    "questions",
    [AdjacentPairs(), AllPairs(), AllPairs(rows=4)],
    ids=["adjacent", "offsets", "offsets of 4x4"],
)
def test_a_network_of_other_pairs_is_asked_about_the_center_by_what_it_learned(
    questions: Questions, batch_norm: str
) -> None:
    model = model_of("small", batch_norm, questions=questions).eval()
    about = about_center(model)
    assert about is not None
    side = math.isqrt(questions.n_cells)
    patches = torch.randn(2, side, side, 3, 32, 32, dtype=torch.float64)
    answers = about.eval()(patches[:, :3, :3].flatten(1, 2))
    assert answers.shape == (2, 8, 8)
    columns = questions.columns_of_positions()
    assert columns is not None
    of_all = model(patches.flatten(1, 2))[:, :, list(columns)]
    pairs = cells_of_pairs(questions)
    center = side + 1
    for label, (down, right) in enumerate(OFFSETS):
        question = pairs.index((center + side * down + right, center))
        torch.testing.assert_close(answers[:, label], of_all[:, question])


def test_a_network_of_the_pairs_with_the_center_is_asked_as_it_is() -> None:
    model = model_of("small")
    assert about_center(model) is model


def test_separate_batch_norm_needs_a_center() -> None:
    with pytest.raises(UsageError, match="pretext_batch_norm=separate .*pretext_batch_norm=joint"):
        model_of("small", "separate", questions=AdjacentPairs())


TRACED = """
import torch
from relloc.models.pair_head import PairHead
from relloc.models.small import SmallBackbone
from relloc.pretext.questions import CENTER_PAIRS, AdjacentPairs, head_sizes
from relloc.pretext.relative_location import RelativeLocation

def model(one_pass, questions, batch_norm):
    torch.manual_seed(0)
    head = PairHead(embedding_dim=14, hidden_dim=16, batch_norm_momentum=0.1, dropout=0.5,
                    neck_std=0.3, head_std=0.3, **head_sizes(questions))
    return RelativeLocation(SmallBackbone(widths=(8, 8, 10, 12, 14)), head, questions=questions,
                            batch_norm=batch_norm, images_per_batch_norm=8,
                            one_pass=one_pass).train()

cases = ((False, CENTER_PAIRS, "separate"), (True, CENTER_PAIRS, "separate"),
         (False, AdjacentPairs(), "cell"))
for bf16, questions, batch_norm in cases:
    traced, plain = [model(one_pass, questions, batch_norm) for one_pass in (True, False)]
    network = torch.compile(traced, backend="aot_eager", dynamic=False)
    patches = torch.randn(16, 9, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    mask = plain.head.draw_dropout_mask(16, torch.Generator().manual_seed(4))
    for one in (network, plain):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = one(patches, mask)
        questions.loss(logits, questions.truth(torch.zeros(16, 9, 2, dtype=int))).backward()
    for (name, value), other in zip(traced.named_parameters(), plain.parameters(), strict=True):
        if name != "head.neck.0.bias":  # whose gradient batch norm cancels
            print(bf16, name, ((value.grad - other.grad).norm() / other.grad.norm()).item())
"""


@pytest.mark.slow
def test_traced_for_compilation_gradients_are_those_of_the_plain_network(tmp_path: Path) -> None:
    """Tracing is where a compiler goes wrong unseen; "aot_eager" traces it, and runs op by op."""
    # In a process of its own: this one checks shapes at run time, which would be traced as well.
    script = tmp_path / "traced.py"
    script.write_text(TRACED)
    done = start(str(script), folder=tmp_path)
    assert done.wait() == 0, done.text
    printed = [
        line.split() for line in done.text.splitlines() if line.startswith(("True ", "False "))
    ]
    assert len(printed) > 90
    for bf16, name, off in printed:
        assert float(off) < (0.15 if bf16 == "True" else 1e-4), (bf16, name, off)


@every_backbone
@torch.no_grad()
def test_in_evaluation_separate_and_joint_agree_and_permuted_images_give_permuted_logits(
    kind: str,
) -> None:
    separate, joint = model_of(kind).eval(), model_of(kind, "joint").eval()
    patches = patches_of(b=5)
    logits = separate(patches)
    torch.testing.assert_close(joint(patches), logits)
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(separate(patches[order]), logits[order])
    torch.testing.assert_close(separate(patches[2:3]), logits[2:3])


class CellNumber(Backbone):
    """Embeds a patch that is filled with one value as that value."""

    stage_channels = (1,) * 5
    pooled_sides = (1,) * 5
    embedding_dim = 1

    def layers_of_stages(self) -> list[list[nn.Module]]:
        raise NotImplementedError

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def embed(self, patches: Tensor) -> Tensor:
        return patches[:, 0, 0, :1]


class Difference(nn.Module):
    def forward(
        self, parts: Sequence[Tensor], combine: Callable[..., Tensor], _mask: None
    ) -> Tensor:
        neighbors, centers = parts
        return combine([neighbors, -centers]).expand(-1, -1, 8)


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("batch_norm", ["separate", "joint"])
def test_pair_i_is_the_ith_cell_of_the_grid_that_is_not_the_center_with_the_center(
    batch_norm: str, one_pass: bool
) -> None:
    model = RelativeLocation(
        CellNumber(),
        Difference(),
        batch_norm=batch_norm,  # type: ignore[arg-type]
        images_per_batch_norm=1,
        one_pass=one_pass,
    )
    cells = torch.stack(
        [torch.arange(9.0), torch.arange(9.0) * 10]
    )  # cell numbers, and ten times as much
    patches = cells.reshape(2, 9, 1, 1, 1).expand(2, 9, 3, 32, 32)
    expected = torch.tensor([cell - 4.0 for cell in NEIGHBOR_CELLS])
    answers = model(patches)
    assert torch.equal(answers[0, :, 0], expected)
    assert torch.equal(answers[1, :, 0], 10 * expected)


def test_another_batch_norm_is_an_error_that_names_the_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users have no type checker
    with pytest.raises(ValueError, match=r"pretext_batch_norm is sync: .*\bseparate, joint"):
        RelativeLocation(CellNumber(), Difference(), batch_norm="sync", images_per_batch_norm=1)  # type: ignore[arg-type]
