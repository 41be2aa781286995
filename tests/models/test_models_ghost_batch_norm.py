import functools

import pytest
import torch
from torch import Tensor, nn

from relloc.models.ghost_batch_norm import GhostBatchNorm, Groups, use_ghost_batches
from relloc.models.resnet import ResNetBackbone

GROUPS = Groups(images=3, rows_per_image=(4, 1))


def norms(*, affine: bool = True, groups: Groups = GROUPS) -> tuple[nn.BatchNorm2d, GhostBatchNorm]:
    """A plain batch norm and the ghost one made of it, with weights and statistics of their own."""
    plain = nn.BatchNorm2d(5, momentum=0.3, affine=affine).double()
    generator = torch.Generator().manual_seed(0)
    for value in plain.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.5, 2, generator=generator)
    return plain, GhostBatchNorm(plain, groups).double()


def rows(n: int, *shape: int) -> Tensor:
    return (
        torch.randn(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3
        + 7
    )


def group_by_group(norm: nn.Module, x: Tensor, sizes: list[int]) -> Tensor:
    return torch.cat([norm(part) for part in x.split(sizes)])


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_it_is_a_batch_norm_of_each_group_alone(
    affine: bool, memory_format: torch.memory_format
) -> None:
    plain, ghost = norms(affine=affine)
    x = rows(30, 5, 2, 4).contiguous(memory_format=memory_format)  # two ghost batches of (12, 3)
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, found = group_by_group(plain, one, [12, 3, 12, 3]), ghost(other)
    torch.testing.assert_close(found, expected)
    weights = torch.randn(
        expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    for output in (expected, found):
        (output.square() * weights).sum().backward()
    torch.testing.assert_close(other.grad, one.grad)
    for value, twin in zip(ghost.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(value.grad, twin.grad)
    for (
        name,
        value,
    ) in plain.state_dict().items():  # running statistics moved group by group, in order
        torch.testing.assert_close(ghost.state_dict()[name], value, msg=name)


def test_the_gradient_is_that_of_finite_differences() -> None:
    _, ghost = norms(groups=Groups(images=2, rows_per_image=(2, 1)))
    x = rows(6, 5, 1, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda given: ghost(given), (x,))


def test_vectors_are_normalized_like_maps_of_one_place() -> None:
    plain = nn.BatchNorm1d(5).double()
    ghost = GhostBatchNorm(plain, GROUPS).double()
    x = rows(15, 5)
    torch.testing.assert_close(ghost(x), group_by_group(plain, x, [12, 3]))


def test_in_evaluation_it_is_the_plain_one() -> None:
    plain, ghost = norms()
    x = rows(7, 5, 2, 2)  # no whole ghost batch
    assert torch.equal(ghost.eval()(x), plain.eval()(x))


def test_bfloat16_maps_are_normalized_in_float32() -> None:
    plain, ghost = (norm.float() for norm in norms())
    x = rows(15, 5, 2, 2).bfloat16()
    found = ghost(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(
        found.float(), group_by_group(plain, x.float(), [12, 3]), rtol=1e-2, atol=1e-2
    )


def test_rows_that_fill_no_ghost_batch_are_refused() -> None:
    _, ghost = norms()
    with pytest.raises(ValueError, match=r"\b18 rows .*\b3 x 5\b"):
        ghost(rows(18, 5, 2, 2))
    with pytest.raises(ValueError, match=r"\b0 images"):
        Groups(images=0, rows_per_image=(1,))


def test_every_batch_norm_inside_is_replaced_and_all_names_and_values_stay() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 5, 1), nn.Sequential(nn.BatchNorm2d(5), nn.ReLU()), nn.BatchNorm2d(5)
    )
    before = {name: value.clone() for name, value in network.state_dict().items()}
    use_ghost_batches(network, GROUPS)
    assert [isinstance(module, GhostBatchNorm) for module in (network[1][0], network[2])] == [
        True,
        True,
    ]
    assert list(network.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_gradients_reach_convolutions_in_their_memory_format() -> None:
    """Else each is copied once more: ReLU and the residual sum write into a batch norm's output."""
    trunk = ResNetBackbone(depth=50).to(memory_format=torch.channels_last)
    use_ghost_batches(trunk, Groups(images=2, rows_per_image=(2, 1)))
    copied = []

    def look(name: str, gradient: Tensor) -> None:
        if not gradient.is_contiguous(memory_format=torch.channels_last):
            copied.append(name)

    for name, child in trunk.named_modules():
        if isinstance(child, nn.Conv2d):
            child.register_forward_hook(
                lambda _, __, out, name=name: (
                    out.register_hook(functools.partial(look, name)) and None
                )
            )
    x = torch.randn(6, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    trunk.embed(x).square().sum().backward()
    assert not copied
