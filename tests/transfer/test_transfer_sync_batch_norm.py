"""The synchronized batch norm of CPUs, in a single process."""

import copy

import pytest
import torch
from torch import nn

from relloc.transfer.sync_batch_norm import CpuSyncBatchNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_value_on_any_process_nothing_changes(dtype: torch.dtype) -> None:
    norm = CpuSyncBatchNorm(nn.BatchNorm2d(4))
    before = copy.deepcopy(norm.state_dict())
    no_regions = torch.zeros(0, 4, 14, 14, dtype=dtype)
    output = norm(no_regions)
    assert output.shape == no_regions.shape
    assert output.dtype == dtype
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name]), name
    # An optimizer treats gradients of 0 otherwise than missing ones.
    output.sum().backward()
    for parameter in norm.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_with_values_it_is_the_batch_norm_of_pytorch() -> None:
    plain = nn.BatchNorm2d(4)
    norm = CpuSyncBatchNorm(copy.deepcopy(plain))
    values = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(norm(values), plain(values))
    torch.testing.assert_close(norm.running_var, plain.running_var)
