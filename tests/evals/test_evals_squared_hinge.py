"""The solver beside scikit-learn's LinearSVC (LIBLINEAR) with a much smaller tolerance."""

import math

import pytest
import torch
from sklearn.svm import LinearSVC
from torch import Tensor

from relloc.data.folder import class_folders
from relloc.data.loader import collate
from relloc.data.photos import photos
from relloc.data.views import Squash, Views
from relloc.errors import UsageError
from relloc.evals.squared_hinge import fit, leading_factor
from relloc.evals.voc07 import class_weights
from relloc.evaluation.average_precision import ap_area
from relloc.features.source import encode
from relloc.models.resnet import ResNetBackbone

COSTS = [0.5**power for power in range(19, 3, -1)] + [1.0, 10.0, 100.0]
N, DIM = 90, 140
BEYOND_THE_RANK = 260
REAL_LAYERS = ("feature1", "feature5")


def features(kind: str, n: int = N, dim: int = DIM) -> Tensor:
    """Rows of length one, as in the benchmark; networks' features are much alike and positive."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(n, dim, generator=rng, dtype=torch.float64)
    if kind == "alike":
        x = (x * torch.arange(1, dim + 1).double() ** -0.6 + 0.3).relu()
    if kind == "duplicates":
        x[1::2] = x[::2]
    if kind == "constant":
        x[:, :40] = 3.0
    return x / (x.norm(dim=1, keepdim=True) + 1e-5)


def signs_of(x: Tensor, positives: int) -> Tensor:
    rng = torch.Generator().manual_seed(2)
    direction = torch.randn(x.shape[1], generator=rng, dtype=torch.float64)
    ranked = (x @ direction + 0.02 * torch.randn(len(x), generator=rng)).argsort(descending=True)
    signs = -torch.ones(len(x), dtype=torch.float64)
    signs[ranked[:positives]] = 1
    return signs


def objective(w: Tensor, x: Tensor, signs: Tensor, weights: Tensor) -> float:
    slack = (1 - signs * (x @ w)).clamp(min=0)
    return float(w @ w / 2 + (weights * slack.square()).sum())


def liblinear(x: Tensor, signs: Tensor, cost: float) -> Tensor:
    """Weights with the intercept last.

    It solves the problem in the span of the rows, where the weights lie: a rotation, and a
    hundredth of the columns.
    """
    span, rows = torch.linalg.qr(x.T)
    svm = LinearSVC(C=cost, class_weight={1: 2, -1: 1}, tol=1e-9, max_iter=2_000_000, dual=True)
    svm.fit(rows.T.numpy(), signs.numpy())
    return torch.cat([span @ torch.from_numpy(svm.coef_[0]), torch.from_numpy(svm.intercept_)])


@pytest.mark.parametrize(
    ("kind", "positives"),
    [
        ("random", 30),
        ("alike", 12),
        ("alike", 1),
        ("duplicates", 20),
        ("constant", 10),
        ("alike", N - 1),
    ],
)
def test_all_costs_equal_liblinear(kind: str, positives: int) -> None:
    x = features(kind)
    assert_as_liblinear(x, signs_of(x, positives))


def test_images_that_nearly_tie_keep_their_order() -> None:
    """A solver that stops at a relative 1e-9 has an AP that is more than 1e-4 off LIBLINEAR's."""
    x = features("alike", n=420, dim=600)
    assert_as_liblinear(x, signs_of(x, positives=15))


@pytest.fixture(
    scope="module", params=["photos", pytest.param("imagenette", marks=pytest.mark.data)]
)
def of_real_images(request: pytest.FixtureRequest) -> tuple[dict[str, Tensor], Tensor]:
    """Features by layer, and signs, of tiles of the images of `data=photos`, or of Imagenette."""
    if request.param == "photos":
        images = photos(tiles=[0.2, 0.4], stride=0.4).train
    else:
        root = request.getfixturevalue("real_images") / "imagenette_small"
        images = class_folders(name="real", root=str(root), train="train", val="val").train
    indices = torch.linspace(0, len(images) - 1, BEYOND_THE_RANK).long()
    views = Views(images, Squash(short_px=64, side_px=64))
    torch.manual_seed(0)
    backbone = ResNetBackbone(depth=18).eval()
    with torch.no_grad():
        pixels = collate([views[index, 0] for index in indices.tolist()]).pixels
        encoded = encode(backbone, pixels, REAL_LAYERS, False)
    return encoded, torch.where(torch.as_tensor(images.labels)[indices] < 3, 1.0, -1.0).double()


@pytest.mark.parametrize("layer", REAL_LAYERS)
@pytest.mark.slow
def test_all_costs_equal_liblinear_on_features_of_real_images(
    of_real_images: tuple[dict[str, Tensor], Tensor], layer: str
) -> None:
    """More images than the preconditioner's rank: even what it leaves out is ill-conditioned."""
    encoded, signs = of_real_images
    x = encoded[layer].double()
    x = x / (x.norm(dim=1, keepdim=True) + 1e-5)
    gram, twice_the_highest_weight = x @ x.T + 1, 2 * 2 * max(COSTS)
    factor = leading_factor(gram)
    assert factor.shape[1] < len(x)
    assert twice_the_highest_weight * torch.linalg.eigvalsh(gram - factor @ factor.T)[-1] > 1
    assert_as_liblinear(x, signs)


def assert_as_liblinear(x: Tensor, signs: Tensor) -> None:
    """Objectives, average precision and decisions at all costs."""
    with_one = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    gram = with_one @ with_one.T
    weights = class_weights(signs > 0).unsqueeze(1) * torch.tensor(COSTS, dtype=torch.float64)
    columns = signs.unsqueeze(1).expand_as(weights)
    factor = leading_factor(gram)
    fitted = fit(gram[None], columns[None], weights[None], factor=factor[None])
    for index, cost in enumerate(COSTS):
        ours, theirs = with_one.T @ fitted.coefficients[0, :, index], liblinear(x, signs, cost)
        least, other = (objective(w, with_one, signs, weights[:, index]) for w in (ours, theirs))
        assert least == pytest.approx(other, rel=1e-6)
        assert least <= other * (1 + 1e-9)
        positive, everything = (signs > 0).unsqueeze(1), torch.ones(len(x), 1, dtype=torch.bool)
        precision = [
            float(ap_area((with_one @ w).unsqueeze(1), positive, everything))
            for w in (ours, theirs)
        ]
        assert precision[0] == pytest.approx(precision[1], abs=1e-4)
        torch.testing.assert_close(
            fitted.decisions[0, :, index], with_one @ ours, rtol=0, atol=1e-9
        )


def problems(n: int = 60, m: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = features("alike")[:n]
    gram = (x @ x.T + 1).unsqueeze(0)
    rng = torch.Generator().manual_seed(4)
    signs = torch.where(torch.rand(1, n, m, generator=rng) < 0.3, 1.0, -1.0).double()
    weights = class_weights(signs > 0) * torch.logspace(-5, 2, m, dtype=torch.float64)
    return gram, signs, weights, leading_factor(gram[0]).unsqueeze(0)


def test_examples_of_weight_zero_are_as_good_as_not_there() -> None:
    gram, signs, weights, factor = problems()
    inside = torch.arange(60) % 3 != 0
    masked = fit(gram, signs, weights * inside.view(1, -1, 1), factor=factor)
    alone = fit(
        gram[:, inside][:, :, inside],
        signs[:, inside],
        weights[:, inside],
        factor=factor[:, inside],
    )
    torch.testing.assert_close(
        masked.coefficients[:, inside], alone.coefficients, rtol=1e-4, atol=1e-6
    )
    assert not masked.coefficients[:, ~inside].any()


def test_problems_do_not_depend_on_which_are_solved_beside_them_nor_on_the_start() -> None:
    gram, signs, weights, factor = problems()
    together = fit(gram, signs, weights, factor=factor)
    for m in range(signs.shape[2]):
        one = slice(m, m + 1)
        alone = fit(gram, signs[..., one], weights[..., one], factor=factor)
        torch.testing.assert_close(
            alone.decisions, together.decisions[..., one], rtol=1e-4, atol=1e-4
        )
    again = fit(gram, signs, weights, factor=factor, start=together.coefficients)
    assert torch.equal(again.coefficients, together.coefficients)
    elsewhere = fit(gram, signs, weights, factor=factor, start=torch.ones_like(signs))
    torch.testing.assert_close(elsewhere.decisions, together.decisions, rtol=1e-4, atol=1e-4)


def test_several_gram_matrices_at_once_are_each_solved_as_alone() -> None:
    gram, signs, weights, factor = problems()
    halves = [slice(0, 30), slice(30, 60)]
    batched = fit(
        torch.cat([gram[:, half, half] for half in halves]),
        torch.cat([signs[:, half] for half in halves]),
        torch.cat([weights[:, half] for half in halves]),
        factor=torch.cat([factor[:, half] for half in halves]),
    )
    for index, half in enumerate(halves):
        alone = fit(gram[:, half, half], signs[:, half], weights[:, half], factor=factor[:, half])
        torch.testing.assert_close(
            batched.decisions[index], alone.decisions[0], rtol=1e-4, atol=1e-4
        )


def test_torchs_own_chance_is_left_alone() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    leading_factor(problems()[0][0])
    assert torch.equal(torch.rand(3), wanted)


def test_features_that_are_not_finite_end_in_one_message() -> None:
    gram, signs, weights, factor = problems()
    for broken in (
        {"gram": gram * math.nan},
        {"weights": weights * math.inf},
        {"start": signs * math.nan},
    ):
        given = {"gram": gram, "signs": signs, "weights": weights, "factor": factor} | broken
        with pytest.raises(UsageError, match="not finite"):
            fit(**given)
