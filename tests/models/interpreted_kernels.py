"""Tests of kernels as Triton interprets them, on a CPU.

Triton has to know at its import that kernels are interpreted, so that these tests have a process of
their own, which test_models_ghost_batch_norm_kernel.py starts.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from triton.runtime import interpreter

from relloc.models import ghost_batch_norm, ghost_batch_norm_kernel, resnet
from relloc.models.ghost_batch_norm import GhostBatchNorm, Groups, use_ghost_batches
from relloc.models.max_pool_kernel import max_pool
from relloc.models.resnet import ResNetBackbone

SEPARATE, JOINT, CELL = (8, 1), (9,), (1,) * 9
# The interpreter rounds to bfloat16 towards zero.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def _range_of_newer_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `range` in kernels work: the interpreter of Triton 3.6 fails at that with NumPy 2.4."""
    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor: object, scope: interpreter._LangPatchScope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda number: int(number.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_with_index)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """A switch between kernels and the code for torch.compile, also on a CPU."""
    taken = ghost_batch_norm.kernels_take

    def switch(on: bool) -> None:
        for module in (ghost_batch_norm, resnet):
            monkeypatch.setattr(module, "kernels_take", lambda x: on and x.dtype != torch.float64)

    assert not taken(torch.ones(1, 1))
    return switch


def difference(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of what is expected."""
    found, expected = found.detach().double(), expected.detach().double()
    return ((found - expected).norm() / expected.norm().clamp(min=1e-9)).item()


def norm_of(
    groups: Groups, c: int, *, affine: bool = True, momentum: float = 0.3
) -> GhostBatchNorm:
    plain = nn.BatchNorm2d(c, momentum=momentum, affine=affine)
    generator = torch.Generator().manual_seed(0)
    for value in plain.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.5, 2, generator=generator)
    return GhostBatchNorm(plain, groups)


def values(shape: tuple[int, ...], seed: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def check(
    switch: Callable[[bool], None],
    rows_per_image: tuple[int, ...],
    c: int,
    hw: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    residual: bool = False,
    relu: bool = False,
    images: int = 2,
    ghosts: int = 2,
    affine: bool = True,
    momentum: float = 0.3,
) -> None:
    """Compares outputs, gradients and running statistics with those of the code in torch.

    That computes in float32, with the same inputs, which kernels read as `dtype`.
    """
    groups = Groups(images=images, rows_per_image=rows_per_image)
    norm = norm_of(groups, c, affine=affine, momentum=momentum)
    shape = (ghosts * images * groups.blocks, c, *hw)
    # A mean for each channel, some of which are far from zero
    means = values((1, c, *(1,) * len(hw)), 9) * 3
    x, added = (values(shape, 1) + means).to(dtype), values(shape, 2, dtype=dtype)
    weights = values(shape, 3, dtype=dtype), values(shape, 4, dtype=dtype)

    def tensors(by_kernels: bool, dtype: torch.dtype) -> dict[str, Tensor]:
        switch(by_kernels)
        side = copy.deepcopy(norm)
        inputs = [tensor.to(dtype).clone().requires_grad_() for tensor in (x, added)]
        if relu:
            readers = side.with_relu(inputs[0], inputs[1] if residual else None)
        else:
            readers = (side(inputs[0]),)
        weighted = [one * weight.to(dtype) for one, weight in zip(readers, weights, strict=False)]
        sum(one.float().sum() for one in weighted).backward()
        assert all(one.dtype == dtype for one in readers)
        assert side.num_batches_tracked == ghosts * len(rows_per_image)
        found = {"output": readers[0], "gradient of x": inputs[0].grad}
        if residual:
            found["gradient of the residual"] = inputs[1].grad
        for name, value in side.named_parameters():
            found[f"gradient of {name}"] = value.grad
        running = {name: value for name, value in side.state_dict().items() if "running" in name}
        return found | running

    expected, found = tensors(False, torch.float32), tensors(True, dtype)
    for name, value in expected.items():
        assert difference(found[name], value) < TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("residual", "relu"), [(False, False), (False, True), (True, True)])
def test_kernels_are_the_norm_its_sum_and_its_relu(
    kernels: Callable[[bool], None], dtype: torch.dtype, residual: bool, relu: bool
) -> None:
    check(kernels, SEPARATE, 24, (3, 2), dtype=dtype, residual=residual, relu=relu)


@pytest.mark.parametrize("rows_per_image", [SEPARATE, JOINT, CELL])
def test_groups_of_all_kinds(
    kernels: Callable[[bool], None], rows_per_image: tuple[int, ...]
) -> None:
    check(kernels, rows_per_image, 16, (2, 2), residual=True, relu=True)


def test_channels_that_fill_no_tile_and_more_than_one(kernels: Callable[[bool], None]) -> None:
    check(kernels, (1, 1), 5, (2, 2), residual=True, relu=True)
    check(kernels, (1, 1), 130, (2, 2), relu=True)


def test_maps_of_several_tiles_and_parts(kernels: Callable[[bool], None]) -> None:
    # 1,320 pixels of a block: six tiles of a reduction, and two programs of a pass that writes
    check(kernels, (2, 1), 8, (33, 20), residual=True, relu=True)


def test_more_segments_and_parts_than_are_added_at_once(
    kernels: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ghost_batch_norm_kernel, "_TILE_PARTS", 4)
    check(kernels, (5, 1), 8, (33, 20), ghosts=3)


@pytest.mark.parametrize("affine", [True, False])
def test_vectors(kernels: Callable[[bool], None], affine: bool) -> None:
    check(kernels, (8,), 24, (), affine=affine)


def test_a_momentum_of_one_keeps_the_last_statistics_alone(
    kernels: Callable[[bool], None],
) -> None:
    check(kernels, SEPARATE, 8, (2, 2), momentum=1.0)


def test_one_value_per_channel_is_refused(kernels: Callable[[bool], None]) -> None:
    kernels(True)
    norm = norm_of(Groups(images=1, rows_per_image=(8, 1)), 8)
    with pytest.raises(ValueError, match=r"images_per_batch_norm"):
        norm(values((9, 8, 1, 1), 1))


@pytest.mark.parametrize("depth", [18, 50])
def test_a_resnet_has_the_gradients_of_torchvisions_blocks(
    kernels: Callable[[bool], None], depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each program takes long to interpret.
    monkeypatch.setattr(ghost_batch_norm_kernel, "_REDUCING_PROGRAMS", 4)
    torch.manual_seed(0)
    network = ResNetBackbone(depth=depth, width=0.125).to(memory_format=torch.channels_last)
    use_ghost_batches(network, Groups(images=8, rows_per_image=(1, 1)))
    patches = values((16, 3, 32, 32), 1)
    weights = torch.randn(16, network.embedding_dim)

    def tensors(dtype: torch.dtype, by_kernels: bool) -> dict[str, Tensor]:
        kernels(by_kernels)
        side = copy.deepcopy(network).to(dtype)
        embeddings = side.embed(patches.to(dtype))
        (embeddings * weights).sum().backward()
        running = {name: value for name, value in side.state_dict().items() if "running" in name}
        gradients = {name: value.grad for name, value in side.named_parameters()}
        return {"embeddings": embeddings, **gradients, **running}

    exact = tensors(torch.float64, False)
    plain = tensors(torch.float32, False)
    found = tensors(torch.float32, True)
    assert len(found) == 1 + {18: 60 + 40, 50: 159 + 106}[depth]
    # Rounding decides on which side of zero a few values lie, and so whether they have gradients:
    # how much that changes is told by the code for torch.compile.
    by_rounding = max(difference(plain[name], value) for name, value in exact.items())
    for name, value in exact.items():
        assert difference(found[name], value) < 3 * by_rounding + 1e-5, name
    assert by_rounding < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 9, 12), (2, 130, 4, 4)])
def test_max_pooling_is_torchs_with_its_gradient(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Many zeros, as after a ReLU: of equal values the first one is taken."""
    pool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
    generator = torch.Generator().manual_seed(0)
    # Values and gradients that bfloat16 holds exactly, also their sums
    maps = torch.randint(-4, 5, shape, generator=generator).relu().to(dtype)
    maps = maps.to(memory_format=torch.channels_last)
    one, other = maps.clone().requires_grad_(), maps.clone().requires_grad_()
    found, expected = max_pool(one, pool), pool(other)
    assert torch.equal(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)
    grad = torch.randint(-9, 10, expected.shape, generator=generator).to(dtype)
    found.backward(grad)
    expected.backward(grad)
    assert one.grad is not None
    assert other.grad is not None
    assert torch.equal(one.grad, other.grad)
    assert one.grad.stride() == maps.stride()


def test_max_pooling_passes_nan_on() -> None:
    maps = torch.zeros(1, 1, 4, 4)
    maps[0, 0, 0, 0] = float("nan")
    found = max_pool(maps, nn.MaxPool2d(kernel_size=3, stride=2, padding=1))
    assert found.isnan().sum() == 1
