import math

import pytest
import torch
from torch import Tensor, nn

from relloc.models.pair_head import AlexNetPairHead, PairHead
from relloc.pretext.questions import CENTER_PAIRS

DIM = 6


def pair_head(**changes: object) -> PairHead:
    torch.manual_seed(0)
    settings = {"embedding_dim": DIM, "hidden_dim": 16, "batch_norm_momentum": 0.1, "dropout": 0.0}
    return PairHead(**{**settings, "neck_std": 0.5, "head_std": 0.5, **changes})  # type: ignore[arg-type]


def answers(head: nn.Module, neighbors: Tensor, centers: Tensor, *mask: Tensor) -> Tensor:
    return head([neighbors, centers], CENTER_PAIRS.combine, *mask)


def embeddings(b: int = 3, dim: int = DIM) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(b, 8, dim, generator=generator), torch.randn(b, dim, generator=generator)


def pairs_by_hand(neighbors: Tensor, centers: Tensor) -> Tensor:
    """One row a pair, image by image: the neighbor's embedding, then the center's."""
    rows = [
        torch.cat([neighbors[i, pair], centers[i]])
        for i in range(len(centers))
        for pair in range(8)
    ]
    return torch.stack(rows)


def normalized(hidden: Tensor) -> Tensor:
    return (hidden - hidden.mean(dim=0)) / torch.sqrt(hidden.var(dim=0, unbiased=False) + 1e-5)


def test_logits_are_linear_batch_norm_relu_linear_of_neighbor_then_center() -> None:
    head = pair_head().train()
    neighbors, centers = embeddings()
    joint, norm = head.neck[0], head.neck[1]
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.uniform_(norm.bias, -1, 1)
    hidden = pairs_by_hand(neighbors, centers) @ joint.weight.T + joint.bias
    active = (normalized(hidden) * norm.weight + norm.bias).clamp(min=0)
    expected = (active @ head.answer.weight.T + head.answer.bias).reshape(3, 8, 8)
    torch.testing.assert_close(answers(head, neighbors, centers), expected)


def test_the_first_half_of_the_input_is_the_neighbor() -> None:
    head = pair_head().eval()
    neighbors, centers = embeddings()
    with torch.no_grad():
        head.neck[0].weight[:, DIM:] = 0
    before = answers(head, neighbors, centers)
    assert torch.equal(answers(head, neighbors, centers + 1), before)
    assert not torch.allclose(answers(head, neighbors + 1, centers), before)


def test_weights_are_normal_with_the_given_spread_and_biases_zero() -> None:
    head = pair_head(embedding_dim=256, hidden_dim=2048, neck_std=0.01, head_std=0.005)
    assert head.neck[0].weight.shape == (2048, 512)
    assert head.neck[0].weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert head.answer.weight.std().item() == pytest.approx(0.005, rel=0.03)
    assert (
        head.answer.weight.abs().max() > 2.5 * 0.005
    )  # a normal has tails, a uniform with this spread none
    assert torch.all(head.neck[0].bias == 0)
    assert torch.all(head.answer.bias == 0)


def test_running_statistics_move_by_the_given_momentum() -> None:
    head = pair_head(batch_norm_momentum=0.003).train()
    neighbors, centers = embeddings()
    hidden = head.neck[0](pairs_by_hand(neighbors, centers))
    answers(head, neighbors, centers)
    torch.testing.assert_close(head.neck[1].running_mean, 0.003 * hidden.mean(dim=0))
    torch.testing.assert_close(head.neck[1].running_var, 0.997 + 0.003 * hidden.var(dim=0))


def test_dropout_hides_the_hidden_units_that_were_not_kept_in_training_alone() -> None:
    neighbors, centers = embeddings(b=64)
    half = pair_head(hidden_dim=64, dropout=0.5)
    mask = half.draw_dropout_mask(64, torch.Generator().manual_seed(3))
    assert mask.shape == (64, 8, 64)
    assert mask.float().mean().item() == pytest.approx(0.5, abs=0.01)
    assert torch.equal(
        answers(half.eval(), neighbors, centers, mask), answers(half, neighbors, centers)
    )
    seen: list[Tensor] = []
    half.answer.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    answers(half.train(), neighbors, centers, mask)
    answers(half, neighbors, centers, torch.ones_like(mask))
    dropped, doubled = seen
    assert torch.equal(dropped, doubled * mask)
    answers(half, neighbors, centers)
    torch.testing.assert_close(doubled, 2 * seen[-1])


def test_a_head_without_dropout_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    assert pair_head().draw_dropout_mask(4, generator) is None
    assert AlexNetPairHead(embedding_dim=DIM, hidden_dim=16).draw_dropout_mask(4, generator) is None
    assert torch.equal(generator.get_state(), before)


def test_embed_dim_puts_a_linear_layer_before_applied_to_each_patch_alone() -> None:
    head = pair_head(embed_dim=4).eval()
    neighbors, centers = embeddings()
    assert head.neck[0].in_features == 8
    weight, bias = head.embed.weight, head.embed.bias
    without = pair_head(embedding_dim=4).eval()
    without.load_state_dict(
        {name: v for name, v in head.state_dict().items() if not name.startswith("embed")}
    )
    expected = answers(without, neighbors @ weight.T + bias, centers @ weight.T + bias)
    torch.testing.assert_close(answers(head, neighbors, centers), expected)


def test_the_heads_of_the_card_have_the_published_tensors() -> None:
    with torch.device("meta"):
        head = PairHead(
            embedding_dim=2048,
            hidden_dim=4096,
            batch_norm_momentum=0.003,
            dropout=0.5,
            neck_std=0.01,
            head_std=0.005,
        )
    shapes = {name: tuple(value.shape) for name, value in head.named_parameters()}
    assert shapes == {
        "neck.0.weight": (4096, 4096),
        "neck.0.bias": (4096,),
        "neck.1.weight": (4096,),
        "neck.1.bias": (4096,),
        "answer.weight": (8, 4096),
        "answer.bias": (8,),
    }


def test_the_alexnet_head_normalizes_fc7_without_scale_and_shift_and_fc8_not_at_all() -> None:
    torch.manual_seed(0)
    head = AlexNetPairHead(embedding_dim=DIM, hidden_dim=16).train()
    for layer in (head.fc7, head.fc8, head.fc9):
        nn.init.uniform_(layer.bias, -0.5, 0.5)
    neighbors, centers = embeddings()
    fc7 = normalized(pairs_by_hand(neighbors, centers) @ head.fc7.weight.T + head.fc7.bias).clamp(
        min=0
    )
    fc8 = (fc7 @ head.fc8.weight.T + head.fc8.bias).clamp(min=0)
    expected = (fc8 @ head.fc9.weight.T + head.fc9.bias).reshape(3, 8, 8)
    torch.testing.assert_close(answers(head, neighbors, centers), expected)
    assert head.norm.weight is None
    assert {name.split(".")[0] for name, _ in head.named_parameters()} == {"fc7", "fc8", "fc9"}


def test_the_alexnet_head_starts_with_xavier_weights_and_zero_biases() -> None:
    torch.manual_seed(0)
    head = AlexNetPairHead(embedding_dim=64, hidden_dim=256)
    for layer in (head.fc7, head.fc8, head.fc9):
        bound = math.sqrt(6 / sum(layer.weight.shape))
        assert layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
        assert torch.all(layer.bias == 0)


@pytest.mark.parametrize("kind", ["mmselfsup", "alexnet"])
def test_in_evaluation_each_pair_is_answered_alone(kind: str) -> None:
    head = (
        pair_head() if kind == "mmselfsup" else AlexNetPairHead(embedding_dim=DIM, hidden_dim=16)
    ).eval()
    neighbors, centers = embeddings()
    together = answers(head, neighbors, centers)
    torch.testing.assert_close(answers(head, neighbors[1:2], centers[1:2]), together[1:2])
    order = torch.tensor([3, 1, 0, 2, 7, 5, 6, 4])
    torch.testing.assert_close(answers(head, neighbors[:, order], centers), together[:, order])
