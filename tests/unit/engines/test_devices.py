"""Devices: what work costs, when they can be reached, and that it is the same whoever asks."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tesserafl.core.errors import ConfigError
from tesserafl.engines.device import FOREVER, INSTANT, Chain, Device, Link, Placed, _lot
from tesserafl.engines.profiles import LINKS, PROFILES

fast = settings(max_examples=60, deadline=None)
LOAD = Chain(values=(0.0, 0.5, 0.9), mean_seconds=(3.0, 1.0, 2.0))
ONLINE = Chain(values=(1.0, 0.0), mean_seconds=(5.0, 2.0))
seconds = st.floats(0, 3000, allow_nan=False)


def placed(device: Device, id: int = 4, seed: int = 7) -> Placed:
    return Placed(device=device, id=id, seed=seed)


def walked(chain: Chain, until: float, seed: int = 7, device: int = 4, name: str = "load") -> Any:
    """The chain from 0 on, as (start, end, value), by asking at every switch."""
    stays, now = [], 0.0
    while now < until:
        value, end = chain.at(now, seed, device, name)
        assert end > now  # or a loop over a chain would never end
        stays.append((now, min(end, until), value))
        now = end
    return stays


# Links.


def test_a_link_takes_its_latency_and_its_bytes_each_way() -> None:
    link = Link(up_mbps=8, down_mbps=16, latency_ms=250)
    assert link.seconds_up(2_000_000) == 0.25 + 2.0  # 16 Mbit at 8 Mbit/s
    assert link.seconds_down(2_000_000) == 0.25 + 1.0
    assert INSTANT.seconds_up(1e12) == INSTANT.seconds_down(1e12) == 0.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"up_mbps": 0}, "a link's up_mbps must be positive; got 0"),
        ({"down_mbps": -2.0}, r"a link's down_mbps must be positive; got -2\.0"),
        ({"up_mbps": math.nan}, "got nan"),
        ({"latency_ms": -1.0}, r"latency_ms must be 0 or more; got -1\.0"),
        ({"latency_ms": math.nan}, "got nan"),
    ],
)
def test_links_that_cannot_be(given: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Link(**{"up_mbps": 1.0, "down_mbps": 1.0, **given})


# Chains.


@given(st.lists(seconds, min_size=1, max_size=20), st.randoms(use_true_random=False))
@fast
def test_a_value_depends_on_the_moment_and_not_on_who_asked_before(
    asked: list[float], random: Any
) -> None:
    first = {moment: LOAD.at(moment, 7, 4, "load") for moment in asked}
    random.shuffle(asked)
    _lot.cache_clear()
    assert {moment: LOAD.at(moment, 7, 4, "load") for moment in asked} == first


def test_seed_device_and_purpose_each_make_another_chain() -> None:
    one = walked(LOAD, 100.0)
    assert walked(LOAD, 100.0) == one
    for other in ({"seed": 8}, {"device": 5}, {"name": "online"}):
        assert walked(LOAD, 100.0, **other) != one


@given(seconds)
@fast
def test_a_value_stays_until_the_moment_that_was_said(moment: float) -> None:
    value, until = LOAD.at(moment, 7, 4, "load")
    assert until > moment
    for share in (0.25, 0.5, 0.999):
        between = moment + share * (until - moment)
        if moment <= between < until:
            assert LOAD.at(between, 7, 4, "load")[0] == value


@given(st.integers(0, 40), st.integers(-3, 3))
@fast
def test_time_goes_on_where_lots_of_stays_meet(number: int, ulps: int) -> None:
    """At their seams a sum of floats may fall on either side."""
    for chain in (LOAD, ONLINE, Chain(values=(0.1, 0.2), mean_seconds=(1 / 3, 0.1))):
        moment = number * chain._block_seconds
        for _ in range(abs(ulps)):
            moment = max(0.0, math.nextafter(moment, math.copysign(math.inf, ulps)))
        value, until = chain.at(moment, 7, 4, "load")
        assert value in chain.values
        assert moment < until <= moment + 1.001 * chain._block_seconds


def test_a_single_value_stays_for_ever() -> None:
    assert Chain(values=(0.3,), mean_seconds=(1.0,)).at(1e12, 0, 0, "load") == (0.3, FOREVER)


def test_shares_of_the_time_are_as_the_mean_stays() -> None:
    # 4 devices x 6000 s with a mean stay of 2 s: 12,000 stays. The share of one level is off by
    # about 0.5 / sqrt(12,000) = 0.005; the bounds are four times that.
    total, of = 0.0, dict.fromkeys(LOAD.values, 0.0)
    for device in range(4):
        for start, end, value in walked(LOAD, 6000.0, device=device):
            of[value] += end - start
            total += end - start
    for value, share in zip(LOAD.values, (3 / 6, 1 / 6, 2 / 6), strict=True):
        assert of[value] / total == pytest.approx(share, abs=0.02)


def test_no_moment_is_special() -> None:
    """Not the first, at which all chains begin: 1,500 devices, off by 0.013 at the most likely."""
    for moment in (0.0, LOAD._block_seconds):
        found = [LOAD.at(moment, 7, device, "load")[0] for device in range(1500)]
        for value, share in zip(LOAD.values, (3 / 6, 1 / 6, 2 / 6), strict=True):
            assert found.count(value) / 1500 == pytest.approx(share, abs=0.05)


def test_stays_have_the_mean_that_was_asked_and_are_memoryless() -> None:
    stays: dict[float, list[float]] = {value: [] for value in LOAD.values}
    for device in range(4):
        run = walked(LOAD, 6000.0, device=device)
        merged: list[list[float]] = []
        for start, end, value in run:  # a new lot may begin with the value that was there
            if merged and merged[-1][2] == value:
                merged[-1][1] = end
            else:
                merged.append([start, end, value])
        for start, end, value in merged:
            stays[value].append(end - start)
    for value, mean in zip(LOAD.values, LOAD.mean_seconds, strict=True):
        found = stays[value]
        assert len(found) > 1500
        assert sum(found) / len(found) == pytest.approx(mean, rel=0.08)
        # Of an exponential stay 1/e last longer than the mean.
        assert sum(s > mean for s in found) / len(found) == pytest.approx(math.exp(-1), abs=0.04)


@pytest.mark.parametrize(
    ("values", "means", "message"),
    [
        ((), (), "got 0 values and 0 stays"),
        ((0.1, 0.2), (1.0,), "got 2 values and 1 stays"),
        ((0.1,), (0.0,), r"mean stays are positive seconds; got \[0\.0\]"),
        ((0.1,), (math.inf,), r"got \[inf\]"),
        ((0.1,), (math.nan,), r"got \[nan\]"),
    ],
)
def test_chains_that_cannot_be(
    values: tuple[float, ...], means: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Chain(values=values, mean_seconds=means)


# Work.


def brute_force(chain: Chain, start: float, work: float, step: float) -> float:
    """When the work is done, in small steps of time at the speed of their middle."""
    now = start
    while work > 0:
        load, _ = chain.at(now + step / 2, 7, 4, "load")
        work -= step * (1 - load)
        now += step
    return now


@given(st.floats(0, 200), st.floats(0.01, 20))
@settings(max_examples=25, deadline=None)
def test_work_is_done_when_small_steps_say_so(start: float, alone: float) -> None:
    """`alone` is what it takes without a load."""
    device = placed(Device(gflops=2.0, load=LOAD))
    done = device.compute_until(start, alone * 2e9)
    assert done == pytest.approx(brute_force(LOAD, start, alone, 2e-3), abs=0.1)
    assert start + alone <= done * (1 + 1e-12) and done <= start + 10 * alone + 1e-9


@given(st.floats(0, 200), st.floats(0.01, 20), st.floats(0, 1))
@fast
def test_work_in_two_parts_takes_as_long_as_at_once(start: float, alone: float, cut: float) -> None:
    device = placed(Device(gflops=1.0, load=LOAD))
    first = device.compute_until(start, cut * alone * 1e9)
    assert start <= first
    assert device.compute_until(first, (1 - cut) * alone * 1e9) == pytest.approx(
        device.compute_until(start, alone * 1e9), rel=1e-9, abs=1e-9
    )


def test_work_without_a_load_and_without_end() -> None:
    assert placed(Device(gflops=4.0)).compute_until(10.0, 8e9) == 12.0
    half = Chain(values=(0.5,), mean_seconds=(1.0,))
    assert placed(Device(gflops=4.0, load=half)).compute_until(10.0, 8e9) == 14.0
    assert placed(Device(gflops=math.inf)).compute_until(10.0, 1e30) == 10.0
    assert placed(Device(gflops=1.0, load=LOAD)).compute_until(5.0, 0.0) == 5.0


# Presence.


def reachable(device: Device, moment: float) -> bool:
    """By the definition: it is there, and its chain says so."""
    gone = FOREVER if device.leaves_seconds is None else device.leaves_seconds
    there = device.joins_seconds <= moment < gone
    return there and bool(device.online.at(moment, 7, 4, "online")[0])


PRESENT = {
    "comes and goes": Device(gflops=1.0, online=ONLINE),
    "joins": Device(gflops=1.0, online=ONLINE, joins_seconds=11.0),
    "leaves": Device(gflops=1.0, online=ONLINE, leaves_seconds=60.0),
    "passes by": Device(gflops=1.0, online=ONLINE, joins_seconds=20.5, leaves_seconds=21.5),
    "stays": Device(gflops=1.0, joins_seconds=3.0, leaves_seconds=9.0),
    "never": Device(gflops=1.0, online=Chain(values=(0.0,), mean_seconds=(1.0,))),
}


@pytest.mark.parametrize("name", PRESENT)
@given(st.floats(0, 100))
@fast
def test_when_it_comes_and_until_when_it_stays(name: str, moment: float) -> None:
    device = PRESENT[name]
    where = placed(device)
    comes, stays = where.online_from(moment), where.online_until(moment)
    assert moment <= comes and moment <= stays
    if reachable(device, moment):
        assert comes == moment < stays
    else:
        assert stays == moment < comes
    # Between now and then nothing changes, and then it does.
    for share in (0.001, 0.3, 0.7, 0.999):
        if comes < FOREVER and moment <= (between := moment + share * (comes - moment)) < comes:
            assert not reachable(device, between)
        if stays < FOREVER and moment <= (between := moment + share * (stays - moment)) < stays:
            assert reachable(device, between)
    if comes < FOREVER:
        assert reachable(device, comes)
        assert where.online_from(comes) == comes < where.online_until(comes)
    if moment < stays < FOREVER:
        assert not reachable(device, stays)
        assert where.online_until(stays) == stays < where.online_from(stays)


@given(st.floats(0, 300), st.floats(0, 50))
@fast
def test_who_stays_until_later_is_there_until_then(moment: float, more: float) -> None:
    where = placed(PRESENT["comes and goes"])
    stays = where.online_until(moment)
    assume(moment + more < stays)
    assert where.online_until(moment + more) == stays


def test_who_leaves_for_good_never_comes_back() -> None:
    leaves = placed(PRESENT["leaves"])
    assert leaves.online_from(60.0) == FOREVER
    assert leaves.online_until(60.0) == 60.0
    assert placed(Device(gflops=1.0)).online_until(5.0) == FOREVER
    assert placed(PRESENT["never"]).online_from(0.0) == FOREVER


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gflops": 0.0}, r"a device's gflops must be positive; got 0\.0"),
        ({"gflops": math.nan}, "got nan"),
        ({"idle_watts": -1.0}, r"a device's idle_watts must be 0 or more; got -1\.0"),
        ({"busy_watts": math.nan}, "busy_watts must be 0 or more; got nan"),
        ({"radio_watts": -0.5}, "radio_watts"),
        ({"joins_seconds": -3.0}, r"joins_seconds must be 0 or more; got -3\.0"),
        (
            {"load": Chain(values=(0.5, 1.0), mean_seconds=(1.0, 1.0))},
            r"in \[0, 1\); got \[0\.5, 1",
        ),
        ({"load": Chain(values=(-0.1,), mean_seconds=(1.0,))}, r"got \[-0\.1\]"),
        (
            {"joins_seconds": 5.0, "leaves_seconds": 5.0},
            r"leaves after it joins; got joins_seconds 5\.0 and leaves_seconds 5\.0",
        ),
    ],
)
def test_devices_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Device(**{"gflops": 1.0, **given})


def test_profiles_are_devices_that_can_be_told_apart() -> None:
    for name, device in PROFILES.items():
        assert device.profile == name
        assert device.link in LINKS.values()
        assert replace(device, link=INSTANT) == replace(device, link=INSTANT)
        # Who computes draws more than who waits, and the radio is no cheaper than waiting.
        assert 0 < device.idle_watts <= device.radio_watts <= device.busy_watts
        assert device.memory_mib is not None and device.memory_mib > 0
    speeds = [PROFILES[n].gflops for n in ("raspberry-pi-4", "raspberry-pi-5", "server-gpu")]
    assert speeds == sorted(speeds)
