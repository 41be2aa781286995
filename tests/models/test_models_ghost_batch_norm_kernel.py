"""Tests of the kernels of ghost batch norm: interpreted on a CPU, and compiled on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from relloc.models import ghost_batch_norm, resnet
from relloc.models.ghost_batch_norm import Groups, use_ghost_batches
from relloc.models.resnet import ResNetBackbone

TESTS = Path(__file__).parent.parent


@pytest.mark.slow
def test_interpreted_kernels_are_the_code_in_torch() -> None:
    pytest.importorskip("triton", reason="torch without Triton has no GPU to run kernels on")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-q", "models/interpreted_kernels.py"],
        cwd=TESTS,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]


@pytest.mark.gpu
@pytest.mark.parametrize("rows_per_image", [(8, 1), (9,), (1,) * 9])
def test_a_resnet50_trains_on_a_gpu_as_by_the_code_in_torch(
    rows_per_image: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network = ResNetBackbone(depth=50).cuda().to(memory_format=torch.channels_last)
    use_ghost_batches(network, Groups(images=16, rows_per_image=rows_per_image))
    network.requires_grad_()
    patches = torch.randn(288, 3, 64, 64, device="cuda").to(memory_format=torch.channels_last)
    weights = torch.randn(288, network.embedding_dim, device="cuda")
    start = {name: value.clone() for name, value in network.state_dict().items()}

    def tensors(by_kernels: bool, bf16: bool) -> dict[str, Tensor]:
        with monkeypatch.context() as patched:
            if not by_kernels:
                for module in (ghost_batch_norm, resnet):
                    patched.setattr(module, "kernels_take", lambda _x: False)
            network.load_state_dict(start)
            network.zero_grad()
            with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
                embeddings = network.embed(patches)
            (embeddings.float() * weights).sum().backward()
        running = {
            name: value.clone() for name, value in network.state_dict().items() if "running" in name
        }
        gradients = {name: value.grad.clone() for name, value in network.named_parameters()}
        return {"embeddings": embeddings.detach(), **gradients, **running}

    exact = tensors(by_kernels=False, bf16=False)
    by_torch = tensors(by_kernels=False, bf16=True)
    by_kernels = tensors(by_kernels=True, bf16=True)
    for name, value in exact.items():
        rounding, difference = [
            ((side[name].float() - value).norm() / value.norm()).item()
            for side in (by_torch, by_kernels)
        ]
        # Kernels round once where torch does so after each of norm, sum and ReLU.
        assert difference < 1.5 * rounding + 1e-3, name
