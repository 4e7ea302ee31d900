"""Numbers are added up as sums over weights, and clocks count only what they should."""

from __future__ import annotations

import math

import pytest

from kllm.observe import units
from kllm.observe.metrics import METRICS, Accumulator, Ema, Eta, Throughput, describe, mfu
from kllm.observe.spark import BARS, sparkline


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Lazy:
    """A stand-in for a device tensor: reading it is counted."""

    reads = 0

    def __init__(self, value: float) -> None:
        self.value = value

    def detach(self) -> Lazy:
        return self

    def __add__(self, other: Lazy) -> Lazy:
        return Lazy(self.value + other.value)

    def __float__(self) -> float:
        Lazy.reads += 1
        return self.value


def test_mean_does_not_depend_on_the_split_into_micro_batches() -> None:
    losses, weights = [3.0, 1.0, 2.0, 5.0], [10, 30, 5, 1]
    whole, parts = Accumulator(), Accumulator()
    whole.add("train/loss", sum(x * w for x, w in zip(losses, weights, strict=True)), sum(weights))
    for loss, weight in zip(losses, weights, strict=True):
        parts.update({"train/loss": (loss * weight, weight)})
    assert parts.read()["train/loss"] == pytest.approx(whole.read()["train/loss"], abs=1e-12)


def test_tensors_are_read_only_when_a_line_is_due() -> None:
    Lazy.reads = 0
    sums = Accumulator()
    for value in (1.0, 2.0, 3.0):
        sums.add("train/loss", Lazy(value), 2.0)
    assert Lazy.reads == 0
    assert sums.read() == {"train/loss": 1.0}
    assert Lazy.reads == 1


def test_no_weight_gives_no_entry_and_read_starts_afresh() -> None:
    sums = Accumulator()
    sums.add("val/loss", 0.0, 0.0)
    sums.add("train/loss", 4.0, 2.0)
    sums.peak("mem/peak", 3.0)
    sums.peak("mem/peak", 2.0)
    assert sums.read() == {"train/loss": 2.0, "mem/peak": 3.0}
    assert sums.read() == {}


def test_reduce_sees_sums_and_weights_of_sorted_names() -> None:
    sums = Accumulator()
    sums.add("b", 6.0, 2.0)
    sums.add("a", 1.0, 1.0)
    seen: list[float] = []

    def two_processes(values: list[float]) -> list[float]:
        seen.extend(values)
        return [values[0] + 3.0, values[1] + 1.0, values[2] + 2.0, values[3] + 2.0]

    assert sums.read(two_processes) == {"a": 2.0, "b": 2.0}
    assert seen == [1.0, 1.0, 6.0, 2.0]


def test_accumulator_continues_after_a_resume() -> None:
    straight, first, second = Accumulator(), Accumulator(), Accumulator()
    for value in (0.1, 0.2, 0.3):
        straight.add("train/loss", value, 1.0)
    first.add("train/loss", 0.1, 1.0)
    second.load_state_dict(first.state_dict())
    second.add("train/loss", 0.2, 1.0)
    second.add("train/loss", 0.3, 1.0)
    assert second.read() == straight.read()


def test_ema_has_no_bias_at_the_start_and_ignores_nan() -> None:
    ema = Ema(0.9)
    assert math.isnan(ema.value)
    assert ema.add(5.0) == pytest.approx(5.0)
    assert ema.add(math.nan) == pytest.approx(5.0)
    assert 4.0 < ema.add(4.0) < 5.0


def test_throughput_leaves_pauses_out() -> None:
    clock = Clock()
    meter = Throughput(clock)
    meter.step(1000)
    clock.now += 2.0
    with meter.pause():
        clock.now += 50.0
    meter.step(1000)
    clock.now += 2.0
    assert meter.read() == {"perf/tok_s": 500.0, "perf/step_s": 2.0}
    assert meter.read() == {}


def test_eta_ignores_the_slow_first_steps() -> None:
    clock = Clock()
    eta = Eta(warmup=2, clock=clock)
    eta.observe(0)
    clock.now += 100  # compilation
    eta.observe(1)
    clock.now += 100
    eta.observe(2)
    assert eta.remaining(12) is None
    clock.now += 3
    eta.observe(3)
    assert eta.remaining(13) == pytest.approx(30.0)
    clock.now += 1.0
    assert eta.remaining(13) == pytest.approx(29.0)


def test_mfu_is_unknown_rather_than_zero() -> None:
    assert mfu(6e6, 1000, None) is None
    assert mfu(6e6, None, 1e12) is None
    assert mfu(6e6, 1000, 1.2e10) == pytest.approx(0.5)


def test_the_table_of_names_is_sound() -> None:
    names = [m.name for m in METRICS]
    assert len(set(names)) == len(names)
    assert all(m.help for m in METRICS)
    assert describe("train/loss").unit == "nats/token"  # type: ignore[union-attr]
    assert describe("eval/world/zh") is not None
    assert describe("loss") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.count(25_829_888), "25.8M"),
        (units.count(999), "999"),
        (units.count(None), "n/a"),
        (units.size(3 << 29), "1.50 GiB"),
        (units.duration(3.14), "3.1s"),
        (units.duration(185), "03:05"),
        (units.duration(7385), "2:03:05"),
        (units.duration(3 * 86400 + 4 * 3600), "3d 04h"),
        (units.duration(math.inf), "n/a"),
        (units.percent(0.613), "61%"),
        (units.percent(None), "n/a"),
        (units.work(1.95e11), "195 GFLOP"),
        (units.age(7200), "2 h"),
    ],
)
def test_numbers_read_well(text: str, expected: str) -> None:
    assert text == expected


def test_sparkline_follows_the_curve() -> None:
    line = sparkline([8, 7, 6, 5, 4, 3, 2, 1], width=8)
    assert line == BARS[::-1]
    assert len(sparkline(list(range(1000)), width=20)) == 20
    assert sparkline([]) == "" and sparkline([math.nan]) == ""
    assert len(set(sparkline([2.0, 2.0, 2.0]))) == 1
