import copy
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from relloc.checkpoints.states import load_training, save_training
from relloc.geometry import PatchGrid
from relloc.models.backbone import Backbone
from relloc.models.pair_head import PairHead
from relloc.models.small import SmallBackbone
from relloc.optimization import StepsDone
from relloc.patches.color import Drop, Keep
from relloc.patches.curriculum import TrainingPatches
from relloc.patches.normalize import ByDataset
from relloc.patches.pipeline import PatchPipeline
from relloc.pretext.loop import Progress, Task, train
from relloc.pretext.optimizer import sgd
from relloc.pretext.relative_location import RelativeLocation
from relloc.pretext.schedule import Constant, Schedule, Step
from relloc.seeds import Use, seed_for

GRID = PatchGrid(patch_px=32, gap_px=4, jitter_px=3, resize=None)
FIXED_GRID = PatchGrid(patch_px=32, gap_px=0, jitter_px=0, resize=None)
PIPELINE = PatchPipeline(grid=GRID, color=Drop(noise="gaussian"), normalize=ByDataset())
WARM = Step(epochs=3, warmup_epochs=1, warmup_from=0.1, milestone_epochs=[2], gamma=0.1)


def forwards(
    number: int, *, first: int = 0, size: int = 4, side: int = GRID.span_px
) -> Iterator[Tensor]:
    """Images of the forwards `first` to `number`, each a function of its index alone."""
    for index in range(first, number):
        generator = torch.Generator().manual_seed(index)
        yield torch.randint(256, (size, 3, side, side), dtype=torch.uint8, generator=generator)


def random_task(
    *, initial_seed: int = 0, run_seed: int = 7, images_per_batch_norm: int = 4, **changes: object
) -> Task:
    """All random at once: jitter, dropped colors, dropout; batch norm and momentum keep state."""
    torch.manual_seed(initial_seed)
    backbone = SmallBackbone(widths=(8, 8, 8, 10, 8))
    head = PairHead(
        embedding_dim=8,
        hidden_dim=16,
        batch_norm_momentum=0.1,
        dropout=0.5,
        neck_std=0.3,
        head_std=0.3,
    )
    model = RelativeLocation(
        backbone, head, batch_norm="separate", images_per_batch_norm=images_per_batch_norm
    )
    optimizer = sgd(
        model,
        lr=0.1,
        lr_images_per_step=4,
        images_per_step=4,
        momentum=0.9,
        weight_decay=1e-4,
        head_weight_decay=5e-4,
    )
    task = Task(
        model=model,
        network=model,
        optimizer=optimizer,
        schedule=WARM,
        draw=TrainingPatches(patches=PIPELINE).draw,
        make=PIPELINE.make,
        steps_per_epoch=2,
        accumulation=1,
        seed_of=lambda step, forward: seed_for(Use.PATCHES, run_seed, step, forward),
        device=torch.device("cpu"),
        bf16=False,
    )
    return dataclasses.replace(task, **changes)  # type: ignore[arg-type]


def exact_task(**changes: object) -> Task:
    """The same in float64; patches are made in float32, which rounds each alike in any forward."""
    task = random_task(**changes)
    task.model.double()
    return dataclasses.replace(task, make=lambda *given: PIPELINE.make(*given).double())


class PlainBackbone(Backbone):
    """One convolution: nothing in it knows of other patches of the batch."""

    stage_channels = (4,) * 5
    pooled_sides = (1,) * 5
    embedding_dim = 4

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 8, stride=4)

    def layers_of_stages(self) -> list[list[nn.Module]]:
        raise NotImplementedError

    def embed(self, patches: Tensor) -> Tensor:
        return self.convolution(patches).tanh().mean(dim=(2, 3))


class PlainHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.answer = nn.Linear(8, 8)

    def draw_dropout_mask(self, n_images: int, generator: torch.Generator) -> None:
        pass

    def forward(self, parts: Sequence[Tensor], _combine: object, _mask: None) -> Tensor:
        neighbors, centers = parts
        return self.answer(torch.cat([neighbors, centers.unsqueeze(1).expand_as(neighbors)], dim=2))


def plain_task(
    *,
    lr: float,
    schedule: Schedule,
    steps_per_epoch: int,
    accumulation: int = 1,
    images_per_batch_norm: int = 1,
) -> Task:
    """No randomness and no batch statistics, so that what a step computes can be written out."""
    torch.manual_seed(0)
    model = RelativeLocation(
        PlainBackbone(),
        PlainHead(),
        batch_norm="separate",
        images_per_batch_norm=images_per_batch_norm,
    )
    pipeline = PatchPipeline(grid=FIXED_GRID, color=Keep(), normalize=ByDataset())
    return random_task(
        model=model,
        network=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=lr),
        schedule=schedule,
        draw=TrainingPatches(patches=pipeline).draw,
        make=pipeline.make,
        steps_per_epoch=steps_per_epoch,
        accumulation=accumulation,
    )


def trained(
    task: Task,
    batches: Iterator[Tensor],
    *,
    begun: StepsDone | None = None,
    stop_after: int | None = None,
    report_every: int = 1,
) -> tuple[StepsDone, list[Progress]]:
    reports: list[Progress] = []
    seen = [begun or task.start()]
    done = train(
        task,
        batches,
        done=seen[0],
        report_every=report_every,
        report=reports.append,
        after_step=lambda at: seen.append(at) or at.step == stop_after,
    )
    assert done == seen[-1].step
    return seen[-1], reports


def assert_same_state(one: Task, other: Task) -> None:
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
    momenta = [task.optimizer.state_dict()["state"] for task in (one, other)]
    assert momenta[0].keys() == momenta[1].keys()
    for index, state in momenta[0].items():
        assert torch.equal(state["momentum_buffer"], momenta[1][index]["momentum_buffer"])


@pytest.mark.parametrize("stopped_after", [1, 3, 5])
def test_resumed_equals_never_stopped_to_the_bit(stopped_after: int, tmp_path: Path) -> None:
    whole = random_task()
    end, reports = trained(whole, forwards(6), report_every=2)
    assert end.step == whole.steps == 6

    first = random_task()
    stopped, first_reports = trained(first, forwards(6), stop_after=stopped_after, report_every=2)
    assert stopped.step == stopped_after
    state = {
        "model": first.model.state_dict(),
        "optimizer": first.optimizer.state_dict(),
        "sums": stopped.sums,
    }
    saved = load_training(save_training(tmp_path, state, stopped.step))

    second = random_task(initial_seed=1)
    second.model.load_state_dict(saved["model"])
    second.optimizer.load_state_dict(saved["optimizer"])
    second.model.eval()  # as after questions on held-out images
    torch.rand(5)  # another process has drawn other random numbers before
    begun = StepsDone(step=saved["step"], sums=saved["sums"])
    end, second_reports = trained(
        second, forwards(6, first=stopped_after), begun=begun, report_every=2
    )
    assert end.step == 6
    assert first_reports + second_reports == reports  # a report straddles the stop
    assert_same_state(second, whole)


def test_another_seed_trains_otherwise_so_that_equality_above_means_something() -> None:
    one, other = random_task(), random_task(run_seed=8)
    trained(one, forwards(6))
    trained(other, forwards(6))
    assert not torch.equal(one.model.backbone.stem[0].weight, other.model.backbone.stem[0].weight)


def test_random_numbers_are_drawn_anew_in_every_forward() -> None:
    seen: list[Tensor] = []
    task = random_task(accumulation=2)
    spy = dataclasses.replace(task, make=lambda *given: seen.append(task.make(*given)) or seen[-1])
    trained(spy, itertools.repeat(next(forwards(1)), 12))
    assert len(seen) == 12
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(seen, 2))


def test_two_accumulated_forwards_equal_one_of_the_whole_batch_without_batch_norm() -> None:
    spans = {"lr": 0.5, "schedule": Constant(epochs=3), "steps_per_epoch": 1}
    whole, halves = plain_task(**spans), plain_task(**spans, accumulation=2)
    images = list(forwards(3, size=6, side=FIXED_GRID.span_px))
    _, of_whole = trained(whole, iter(images))
    _, of_halves = trained(
        halves, itertools.chain.from_iterable(batch.split(3) for batch in images)
    )
    for (name, value), other in zip(
        whole.model.named_parameters(), halves.model.parameters(), strict=True
    ):
        torch.testing.assert_close(value.grad, other.grad, rtol=1e-4, atol=1e-7, msg=name)
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-7, msg=name)
    assert [report.step for report in of_halves] == [1, 2, 3]
    for one, other in zip(of_whole, of_halves, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
        assert other.top1 == one.top1


def test_a_step_moves_every_weight_by_rate_times_gradient() -> None:
    task = plain_task(lr=0.5, schedule=Constant(epochs=1), steps_per_epoch=1)
    twin = copy.deepcopy(task.model)
    images = next(forwards(1, side=FIXED_GRID.span_px))
    truth = twin.questions.truth(*task.draw(len(images), torch.Generator(), 0))
    twin.questions.loss(twin(patches_of(task, images)), truth).backward()
    trained(task, iter([images]))
    for (name, value), before in zip(task.model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(value, before - 0.5 * before.grad, msg=name)


def patches_of(task: Task, images: Tensor) -> Tensor:
    return task.make(images, *task.draw(len(images), torch.Generator(), 0))


def means_by_hand(task: Task, batches: Sequence[Tensor]) -> tuple[float, float]:
    logits = torch.cat([task.model(patches_of(task, images)) for images in batches])
    wrong_by = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.arange(8).repeat(len(logits))
    )
    right = (logits.argmax(dim=2) == torch.arange(8)).double().mean()
    return wrong_by.item(), 100 * right.item()


def test_a_report_is_the_mean_over_the_pairs_since_the_last_one() -> None:
    task = plain_task(lr=0.0, schedule=Constant(epochs=2.5), steps_per_epoch=2, accumulation=2)
    sizes = (
        4,
        4,
        4,
        1,
        2,
        2,
        1,
        3,
        4,
        4,
    )  # also forwards of unequal size: pairs count, not forwards
    images = [
        batch[:size]
        for batch, size in zip(forwards(10, side=FIXED_GRID.span_px), sizes, strict=True)
    ]
    end, reports = trained(task, iter(images), report_every=2)
    assert end.step == task.steps == 5
    assert [report.step for report in reports] == [2, 4, 5]
    assert [report.epoch for report in reports] == [1.0, 2.0, 2.5]
    for report, since in zip(reports, (images[:4], images[4:8], images[8:]), strict=True):
        loss, top1 = means_by_hand(task, since)
        assert report.loss == pytest.approx(loss, rel=1e-6)
        assert report.top1 == pytest.approx(top1)
    assert len({report.loss for report in reports}) == 3


def test_the_rate_follows_the_schedule_step_by_step_in_every_group() -> None:
    task = random_task()
    rates: list[tuple[float, ...]] = []
    reports: list[Progress] = []
    train(
        task,
        forwards(6),
        done=task.start(),
        report_every=1,
        report=reports.append,
        after_step=lambda _at: bool(
            rates.append(tuple(group["lr"] for group in task.optimizer.param_groups))
        ),
    )
    expected = [
        0.01,
        0.055,
        0.1,
        0.1,
        0.01,
        0.01,
    ]  # two steps an epoch: warm-up in the first, a tenth from the third
    assert [report.lr for report in reports] == pytest.approx(expected)
    assert rates == [pytest.approx((rate, rate)) for rate in expected]


def test_stopping_ends_after_the_step_takes_no_image_more_and_keeps_what_was_not_reported() -> None:
    task = random_task()
    batches = forwards(6)
    stopped, reports = trained(task, batches, stop_after=3, report_every=100)
    assert stopped.step == 3
    assert reports == []
    assert stopped.sums[2] == 3 * 4 * 8  # the pairs of three steps
    assert torch.equal(next(batches), next(forwards(4, first=3)))


def test_a_finished_training_does_nothing_more() -> None:
    task = random_task()
    before = copy.deepcopy(task.model.state_dict())
    begun = dataclasses.replace(task.start(), step=6)
    assert trained(task, forwards(0), begun=begun) == (begun, [])
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())


@pytest.mark.parametrize(
    ("epochs", "steps_per_epoch", "steps"),
    [
        (70, 2502, 175140),
        (0.29, 100, 29),
        (2.3, 10, 23),
        (1.66, 10, 17),
        (1.64, 10, 16),
        (0.01, 3, 1),
    ],
)
def test_the_length_in_steps_is_the_nearest_whole_number_and_at_least_one(
    epochs: float, steps_per_epoch: int, steps: int
) -> None:
    task = random_task(schedule=Constant(epochs=epochs), steps_per_epoch=steps_per_epoch)
    assert task.steps == steps


def test_bfloat16_changes_reports_by_rounding_alone_and_weights_stay_float32() -> None:
    exact, rounded = random_task(), random_task(bf16=True)
    _, of_exact = trained(exact, forwards(6), stop_after=1)
    _, of_rounded = trained(rounded, forwards(6), stop_after=1)
    assert of_rounded[0].loss != of_exact[0].loss
    assert of_rounded[0].loss == pytest.approx(of_exact[0].loss, rel=0.02)
    assert {value.dtype for value in rounded.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("size", [4, 8, 16])
def test_how_many_images_pass_at_once_changes_rounding_alone(size: int) -> None:
    """Ghost batches of four images, in forwards of one, two or four; random dropout and colors.

    In float64: batch norm of four images on small maps amplifies rounding 100,000 times in so few
    steps, so that processors differ in float32 by more than a mistake would.
    """
    once = exact_task(accumulation=16 // size)
    other = exact_task(accumulation=4)
    images = list(forwards(24))
    _, of_once = trained(once, (torch.cat(part) for part in batched(images, size // 4)))
    _, of_other = trained(other, iter(images))
    for (name, value), expected in zip(
        once.model.state_dict().items(), other.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(
            value, expected, rtol=1e-6, atol=1e-9, msg=name
        )  # sums in another order
    for one, two in zip(of_once, of_other, strict=True):
        assert one.loss == pytest.approx(two.loss, rel=1e-9)


def batched(images: list[Tensor], n: int) -> Iterator[list[Tensor]]:
    for start in range(0, len(images), n):
        yield images[start : start + n]
