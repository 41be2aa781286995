import pytest
import torch
from torch import Tensor, nn

from relloc.errors import UsageError
from relloc.optimization import Gradients
from relloc.pretext.graphed import Graphed


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 3)).to(
        memory_format=torch.channels_last
    )


def backward(model: nn.Module, images: Tensor) -> None:
    model(images).square().mean().backward()


@pytest.mark.gpu
def test_a_recorded_training_has_the_bits_of_a_plain_one() -> None:
    torch.backends.cudnn.deterministic = True
    images = torch.randn(8, 16, 3, 4, 4, device="cuda")
    trained = []
    for record in (False, True):
        model = network().cuda()
        gradients = Gradients(model.parameters())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)

        def compute(images: Tensor, _nothing: None, model: nn.Module = model) -> Tensor:
            loss = model(images).square().mean()
            loss.backward()
            return loss.detach()

        step = Graphed(compute) if record else compute
        losses = []
        for batch in images:
            gradients.clear()
            losses.append(step(batch, None).clone())
            optimizer.step()
        trained.append([*losses, *model.state_dict().values()])
    for one, other in zip(*trained, strict=True):
        assert torch.equal(one, other)
    assert len({loss.item() for loss in trained[1][:8]}) == 8  # a replay takes what it is given


@pytest.mark.gpu
def test_what_cannot_be_recorded_is_told_with_what_to_do() -> None:
    step = Graphed(lambda x: x * x.sum().item())  # the host waits for a value
    x = torch.ones(3, device="cuda")
    for _ in range(3):
        assert torch.equal(step(x), torch.full_like(x, 3))
    with pytest.raises(UsageError, match="give cuda_graphs=false"):
        step(x)
