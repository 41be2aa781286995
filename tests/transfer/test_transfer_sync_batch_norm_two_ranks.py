"""Synchronized batch norm of two processes, of which one or both have no value.

On GPUs each process has one of its own, or both share the only one, by another backend.
"""

import copy
from pathlib import Path

import pytest
import torch
from commands import start
from torch import Tensor, nn

SCRIPT = """
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from relloc import ranks
from relloc.transfer.sync_batch_norm import synchronize

folder, kind, bf16 = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
if kind == "cuda" and torch.cuda.device_count() > 1:
    device = torch.device("cuda", ranks.local_rank())
    torch.cuda.set_device(device)
    ranks.join(device)
else:
    device = torch.device(kind)
    dist.init_process_group("gloo")
results = {}
for name, case in torch.load(folder / "cases.pt").items():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    network.load_state_dict(case["state"])
    network.to(device)
    synchronize(network, device)
    inputs = case["inputs"][ranks.rank()].to(device)
    weights = case["weights"][ranks.rank()].to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        output = network(inputs)
    (output * weights).sum().backward()
    gradients = {}
    for parameter_name, parameter in network.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients[parameter_name] = ranks.total(grad.clone()).cpu()
    state = {key: value.cpu() for key, value in network.state_dict().items()}
    results[name] = {"output": output.detach().cpu(), "gradients": gradients, "state": state}
torch.save(results, folder / f"results_{ranks.rank()}.pt")
ranks.leave()
"""
COUNTS = ((3, 2), (3, 0), (0, 2), (0, 0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    norm = layers[1]
    assert isinstance(norm, nn.BatchNorm2d)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    assert norm.running_mean is not None
    norm.running_mean.normal_()
    return layers


def values(n: int, channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * n + channels)
    return torch.randn(n, channels, 5, 6, generator=generator)


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_two_processes_are_one_whoever_has_no_value(tmp_path: Path, kind: str, bf16: bool) -> None:
    precise = {"rtol": 1e-3, "atol": 1e-4}
    near = {"rtol": 0.05, "atol": 0.1} if bf16 else precise
    cases = {}
    for counts in COUNTS:
        cases[str(counts)] = {
            "state": network().state_dict(),
            "inputs": [values(n, 3) for n in counts],
            "weights": [values(n, 4) for n in counts],
        }
    torch.save(cases, tmp_path / "cases.pt")
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    done = start(str(script), str(tmp_path), kind, str(bf16), folder=tmp_path, processes=2)
    assert done.wait() == 0, done.text
    found = [torch.load(tmp_path / f"results_{rank}.pt") for rank in (0, 1)]
    for name, case in cases.items():
        plain = network()
        before = copy.deepcopy(plain.state_dict())
        together = torch.cat(case["inputs"])  # type: ignore[arg-type]
        output = plain(together) if len(together) else torch.zeros(0, 4, 5, 6)
        if len(together):
            (output * torch.cat(case["weights"])).sum().backward()  # type: ignore[arg-type]
        outputs = torch.cat([of_rank[name]["output"] for of_rank in found])
        assert outputs.dtype == (torch.bfloat16 if bf16 else torch.float32)
        torch.testing.assert_close(outputs.float(), output.detach(), **near)
        expected = plain.state_dict() if len(together) else before
        for of_rank in found:
            for key, value in expected.items():
                # Nothing counts as a batch where no process has a value.
                limits = near if len(together) else {"rtol": 0, "atol": 0}
                given = of_rank[name]["state"][key]
                torch.testing.assert_close(given, value, **limits, msg=f"{name} {key}")
            for key, parameter in plain.named_parameters():
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                # Gradients are sums over 150 positions.
                limits = {"rtol": 0.05, "atol": 1.0} if bf16 else precise
                summed = of_rank[name]["gradients"][key]
                torch.testing.assert_close(summed, gradient, **limits, msg=f"{name} {key}")
