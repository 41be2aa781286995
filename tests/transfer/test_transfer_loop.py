import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from relloc.errors import DataError, UsageError
from relloc.transfer.loop import Diverged, FineTuning, MicroBatch, split_for_rank
from relloc.transfer.schedule import Milestones, Poly, Schedule

CPU = torch.device("cpu")
Pair = tuple[Tensor, Tensor]


def sample(step: int, number: int) -> Pair:
    generator = torch.Generator().manual_seed(1000 * step + number)
    return torch.randn(6, dtype=torch.float64, generator=generator), torch.tensor(
        (step + number) % 3
    )


class Feed:
    """Steps of `batch` samples in `accumulation` parts; `missing` says how many a step lacks."""

    def __init__(
        self, batch: int = 6, accumulation: int = 1, missing: Callable[[int], int] = lambda step: 0
    ) -> None:
        self.batch, self.accumulation, self.missing = batch, accumulation, missing
        self.asked: list[tuple[int, int]] = []

    def __call__(self, first: int, end: int) -> Iterator[Sequence[MicroBatch[list[Pair]]]]:
        self.asked.append((first, end))
        for step in range(first, end):
            samples = [sample(step, number) for number in range(self.batch - self.missing(step))]
            parts = split_for_rank(samples, self.accumulation)
            yield [MicroBatch(content=list(part), samples=len(part)) for part in parts]


def network(*, dropout: float = 0) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3))
    return layers.double()


def loss_of(net: nn.Module) -> Callable[[list[Pair]], Tensor]:
    def loss(part: list[Pair]) -> Tensor:
        inputs, targets = zip(*part, strict=True)
        return cross_entropy(net(torch.stack(inputs)), torch.stack(targets))

    return loss


def training(
    feed: Feed, net: nn.Module | None = None, lr: float = 0.1, **changes: Any
) -> FineTuning[list[Pair]]:
    net = network() if net is None else net
    settings: dict[str, Any] = {
        "loss": loss_of(net),
        "length": 6,
        "steps_per_unit": 1,
        "schedule": Milestones(milestones=[], gamma=1),
        "synchronized": False,
        "seed": 3,
        "device": CPU,
        "bf16": False,
        "name": "eval.detection",
    }
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=1e-2)
    return FineTuning(net, optimizer, micro_batches=feed, **{**settings, **changes})


def trained(one: FineTuning[list[Pair]], every: int = 2) -> dict[str, Any]:
    for _ in one.reports(every):
        pass
    return one.network.state_dict()


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_a_training_is_that_of_a_plain_loop() -> None:
    found = training(Feed(), schedule=Milestones(milestones=[2, 4], gamma=0.5))
    reports = list(found.reports(3))
    plain = network()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4], gamma=0.5)
    losses = []
    for step in range(6):
        optimizer.zero_grad()
        loss = loss_of(plain)([sample(step, number) for number in range(6)])
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    assert_equal(found.network.state_dict(), plain.state_dict())
    assert [(span.step, span.samples) for span in reports] == [(3, 18), (6, 18)]
    assert [span.loss for span in reports] == pytest.approx(
        [sum(losses[:3]) / 3, sum(losses[3:]) / 3]
    )
    assert [span.lr for span in reports] == pytest.approx([0.05, 0.025])


@pytest.mark.parametrize("accumulation", [2, 3, 4, 6])
def test_accumulated_parts_are_a_whole_batch_however_uneven(accumulation: int) -> None:
    def missing(step: int) -> int:
        return step % 3

    whole = trained(training(Feed(missing=missing)))
    found = trained(training(Feed(missing=missing, accumulation=accumulation)))
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-14, msg=name)


@pytest.mark.parametrize(
    "schedule", [Milestones(milestones=[1], gamma=0.1, warmup=1), Poly(length=3, power=0.9)]
)
def test_stopped_and_gone_on_with_it_ends_with_the_same_bits(schedule: Schedule) -> None:
    def begun() -> FineTuning[list[Pair]]:
        feed = Feed(accumulation=2)
        return training(feed, network(dropout=0.5), schedule=schedule, length=3, steps_per_unit=2)

    whole = trained(begun(), every=1)
    for stop_after in (1, 2, 3):
        stopped = begun()
        pauses = stopped.reports(1)
        for _ in range(stop_after):
            next(pauses)
        saved = copy.deepcopy(stopped.state_dict())
        again = begun()
        torch.manual_seed(stop_after)  # a new process has other random numbers
        again.load_state_dict(saved)
        assert_equal(trained(again, every=1), whole)
        assert all(first >= 2 * stop_after for first, _ in again.micro_batches.asked)  # type: ignore[attr-defined]


def test_spans_end_at_the_same_steps_wherever_a_training_goes_on_from() -> None:
    feed = Feed()
    one = training(feed, length=7, steps_per_unit=2)
    one.step = 3
    assert [span.step for span in one.reports(2)] == [4, 8, 12, 14]
    assert feed.asked == [(3, 14)]  # one source, which may read ahead beside the pauses


def test_each_parameter_group_keeps_its_own_base_rate() -> None:
    net = network()
    groups = [
        {"params": net[0].parameters(), "lr": 0.1},
        {"params": net[3].parameters(), "lr": 1.0},
    ]
    optimizer = torch.optim.SGD(groups)
    seen = []
    settings = {
        "loss": loss_of(net),
        "steps_per_unit": 1,
        "synchronized": False,
        "seed": 0,
        "device": CPU,
    }
    poly = Poly(length=4, power=1)
    one = FineTuning(
        net,
        optimizer,
        micro_batches=Feed(),
        length=4,
        schedule=poly,
        bf16=False,
        name="x",
        **settings,
    )
    for _ in one.reports(1):
        seen.append([group["lr"] for group in optimizer.param_groups])
    assert seen == [pytest.approx([0.1 * factor, factor]) for factor in (1, 0.75, 0.5, 0.25)]


def test_dropout_draws_by_step_and_part_and_leaves_the_global_generator_alone() -> None:
    def drawn(seed: int, torch_seed: int) -> dict[str, Tensor]:
        one = training(Feed(accumulation=2), network(dropout=0.5), seed=seed)
        torch.manual_seed(torch_seed)
        before = torch.get_rng_state()
        state = trained(one)
        assert torch.equal(before, torch.get_rng_state())
        return state

    first = drawn(3, 0)
    assert_equal(first, drawn(3, 1))
    assert any(not torch.equal(value, first[name]) for name, value in drawn(4, 0).items())
    masks: list[Tensor] = []
    net = network(dropout=0.5)
    net[2].register_forward_hook(lambda _module, given, found: masks.append(found / given[0] > 1))
    trained(training(Feed(accumulation=2), net))
    assert len({str(mask.tolist()) for mask in masks}) == len(masks) == 12


def test_images_may_be_lists_of_different_sizes_and_targets_anything() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    ).double()

    def images(step: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
        generator = torch.Generator().manual_seed(step)
        sizes = [(5 + step, 9), (8, 4 + step)]
        return [
            (torch.randn(3, *size, generator=generator).double(), {"point": torch.ones(2)})
            for size in sizes
        ]

    def parts(
        first: int, end: int
    ) -> Iterator[Sequence[MicroBatch[list[tuple[Tensor, dict[str, Tensor]]]]]]:
        for step in range(first, end):
            yield [MicroBatch(content=[one], samples=1) for one in images(step)]

    def loss(part: list[tuple[Tensor, dict[str, Tensor]]]) -> Tensor:
        ((image, target),) = part
        return mse_loss(net(image.unsqueeze(0))[0], target["point"].double())

    one = training(Feed(), net, loss=loss, length=30)
    one.micro_batches = parts  # type: ignore[assignment]
    losses = [span.loss for span in one.reports(10)]
    assert losses[-1] < 0.1 * losses[0]


def test_steps_of_too_few_samples_are_left_out() -> None:
    feed = Feed(missing=lambda step: 5 if step == 1 else 0)
    reports = list(training(feed, least_samples=2, length=2).reports(2))
    assert reports[0].samples == 6
    with pytest.raises(DataError, match=r"eval\.detection: .*\bstep 2\b.*\b2 or more"):
        list(training(Feed(missing=lambda step: 5), least_samples=2, length=2).reports(2))
    empty = training(Feed(missing=lambda step: 6, accumulation=2), length=1)
    with pytest.raises(DataError, match=r"\bstep 1\b.*\b1 or more"):
        list(empty.reports(1))


def test_divergence_is_told_at_the_end_of_the_span_with_what_to_do() -> None:
    with pytest.raises(
        Diverged, match=r"eval\.detection diverged: .* step 4 of 6,.*learning rate.* 1e"
    ) as raised:
        list(training(Feed(), lr=1e200).reports(4))
    assert isinstance(raised.value, UsageError)
    assert "precision" not in str(raised.value)
    with pytest.raises(Diverged, match="or precision=fp32"):
        list(training(Feed(), network().float().double(), lr=1e200, bf16=True).reports(4))
    broken = network()
    one = training(Feed(), broken, length=1)
    broken.register_buffer(
        "statistics", torch.tensor([torch.inf])
    )  # weights count, not the loss alone
    with pytest.raises(Diverged):
        list(one.reports(1))


def test_in_bfloat16_the_weights_stay_in_float32() -> None:
    net = network().float()
    seen = []
    net[3].register_forward_hook(lambda _module, _given, found: seen.append(found.dtype))

    def loss(part: list[Pair]) -> Tensor:
        inputs, targets = zip(*part, strict=True)
        return cross_entropy(net(torch.stack(inputs).float()).float(), torch.stack(targets))

    before = copy.deepcopy(net.state_dict())
    after = trained(training(Feed(), net, loss=loss, bf16=True))
    assert set(seen) == {torch.bfloat16}
    assert {value.dtype for value in after.values()} == {torch.float32}
    assert not torch.equal(before["0.weight"], after["0.weight"])


def test_parts_of_a_step_are_its_samples_in_order() -> None:
    assert split_for_rank(range(7), 3) == [range(2), range(2, 4), range(4, 7)]
    assert split_for_rank([1, 2], 4) == [[], [1], [], [2]]
    assert split_for_rank("abcdef") == ["abcdef"]
