"""What agents may choose, and with which probability they do."""

from __future__ import annotations

import math

import torch

from tesserafl.core import seeds
from tesserafl.core.decisions import (
    NOBODY,
    Observation,
    Options,
    Times,
    decide,
    drawn,
    entropy,
    followed,
    greedy,
    log_probabilities,
    periods_of,
)
from tesserafl.core.schedule import Periods

EACH = Options(most_rounds=3, most_steps=4, unit=5, each=True)
ALIKE = Options(most_rounds=3, most_steps=4, unit=5, each=False)


def times(left: float, first: int = 0, edge: str = "a", clients: tuple[int, ...] = (7, 9)) -> Times:
    # A unit of five steps takes 1 s on the first device and 2 s on the second, its link 1 s.
    return Times(
        edge=edge,
        first=first,
        clients=clients,
        step_seconds=torch.tensor([0.2, 0.4], dtype=torch.float64),
        link_seconds=torch.tensor([1.0, 1.0], dtype=torch.float64),
        backhaul_seconds=4.0,
        left_seconds=left,
    )


def seen(*each: Times) -> Observation:
    return Observation(agent=0, rows=torch.zeros(2, 1), context=torch.zeros(1), times=each)


def test_probabilities_of_what_is_allowed_sum_to_one() -> None:
    draw = seeds.generator(0, "logits")
    logits = 5 * torch.randn(200, 6, generator=draw)
    allowed = torch.rand(200, 6, generator=draw) < 0.4
    allowed[:, 2] = True
    log_probs = log_probabilities(logits, allowed)
    probabilities = log_probs.exp()
    assert torch.allclose(probabilities.sum(dim=1), torch.ones(200))
    assert bool((probabilities[~allowed] == 0).all())
    assert bool((probabilities[allowed] > 0).all())
    # Where one option is left it is certain.
    alone = allowed.sum(dim=1) == 1
    assert bool(alone.any()) and bool((log_probs[alone, 2] == 0).all())


def test_no_choice_is_ruled_out() -> None:
    draw = seeds.generator(0, "choices")
    logits = torch.randn(500, 6, generator=draw)
    allowed = torch.rand(500, 6, generator=draw) < 0.4
    allowed[:, 4] = True
    logits[~allowed] = 50.0  # what is ruled out would be the best by far
    log_probs = log_probabilities(logits, allowed)
    for pick in (greedy, drawn(draw)):
        assert bool(allowed.gather(1, pick(log_probs)[:, None]).all())


def test_options_are_drawn_as_often_as_they_are_probable() -> None:
    log_probs = torch.tensor([0.1, 0.0, 0.7, 0.2]).log().expand(20000, 4)
    counts = torch.bincount(drawn(seeds.generator(1, "often"))(log_probs), minlength=4)
    assert torch.allclose(counts / 20000, torch.tensor([0.1, 0.0, 0.7, 0.2]), atol=0.02)


def test_the_smallest_of_equals_is_greedy() -> None:
    assert greedy(torch.zeros(2, 5)).tolist() == [0, 0]


def test_entropy_by_hand_with_a_gradient_where_options_are_ruled_out() -> None:
    logits = torch.zeros(2, 4, requires_grad=True)
    allowed = torch.tensor([[True, True, True, True], [True, False, True, False]])
    found = entropy(log_probabilities(logits, allowed))
    assert torch.allclose(found, torch.tensor([math.log(4), math.log(2)]))
    found.sum().backward()
    assert logits.grad is not None and bool(torch.isfinite(logits.grad).all())


def test_what_would_end_too_late_is_ruled_out() -> None:
    # gamma_i averages of a unit: gamma_i x (2 + 1) + 4 <= 11.5, so gamma_i <= 2.
    # With gamma_i = 2 a device has (11.5 - 4) / 2 - 1 = 2.75 s: two units of 1 s, one of 2 s.
    logits = torch.zeros(3, 4)
    logits[:, 3] = 9.0  # most of all
    logits[0, 1] = 5.0
    decision = decide(seen(times(11.5)), logits, EACH, greedy)
    assert decision.allowed.tolist() == [
        [True, True, False, False],
        [True, True, False, False],
        [True, False, False, False],
    ]
    assert decision.chosen.tolist() == [1, 0, 0]
    periods = periods_of(seen(times(11.5)), decision, EACH)
    assert (periods["a"].rounds, dict(periods["a"].steps)) == (2, {7: 5, 9: 5})
    # With one average there is time for more: (11.5 - 4) / 1 - 1 = 6.5 s.
    logits[0, 0] = 6.0
    decision = decide(seen(times(11.5)), logits, EACH, greedy)
    assert decision.chosen.tolist() == [0, 3, 0]
    assert decision.allowed[1:].sum(dim=1).tolist() == [4, 3]


def test_where_nothing_fits_the_smallest_stays() -> None:
    for options, factors in ((EACH, 3), (ALIKE, 2)):
        decision = decide(seen(times(-1.0)), torch.randn(factors, 4), options, greedy)
        assert decision.allowed.sum(dim=1).tolist() == [1] * factors
        assert decision.chosen.tolist() == [0] * factors


def test_without_an_end_all_options_of_a_factor_are_allowed_and_no_more() -> None:
    decision = decide(seen(times(math.inf)), torch.zeros(3, 4), EACH, greedy)
    assert decision.allowed.sum(dim=1).tolist() == [3, 4, 4]


def test_devices_alike_are_bound_by_the_slowest() -> None:
    logits = torch.tensor([[9.0, 0, 0, 0], [0, 0, 0, 9.0]])
    decision = decide(seen(times(11.5)), logits, ALIKE, greedy)
    # One average: 2 gamma_1 + 1 + 4 <= 11.5, so gamma_1 <= 3.
    assert decision.allowed[1].tolist() == [True, True, True, False]
    assert dict(periods_of(seen(times(99)), decision, ALIKE)["a"].steps) == {7: 5, 9: 5}


def test_periods_from_elsewhere_become_the_nearest_decision() -> None:
    periods = {"a": Periods(rounds=9, steps={7: 14, 9: 3})}
    each = followed(seen(times(1.0)), periods, 4, EACH)
    assert each.chosen.tolist() == [2, 1, 0, NOBODY]
    assert each.allowed.sum(dim=1).tolist() == [3, 4, 4, 1]
    assert bool(each.allowed[:3].gather(1, each.chosen[:3, None]).all())
    alike = followed(seen(times(1.0)), periods, 2, ALIKE)
    assert alike.chosen.tolist() == [2, 1]
    # What fits is what was given: there and back.
    again = periods_of(seen(times(1.0)), each, EACH)
    assert again == {"a": Periods(rounds=3, steps={7: 10, 9: 5})}
    assert torch.equal(followed(seen(times(1.0)), again, 4, EACH).chosen, each.chosen)


def test_one_agent_may_decide_for_edges_of_which_some_take_no_part() -> None:
    both = seen(times(math.inf), times(math.inf, first=4, edge="c", clients=(1, 2)))
    logits = torch.zeros(6, 4)
    logits[4, 2] = logits[5, 1] = 1.0
    decision = decide(both, logits, ALIKE, greedy)
    assert decision.chosen.tolist() == [0, 0, NOBODY, NOBODY, 2, 1]
    periods = periods_of(both, decision, ALIKE)
    assert (periods["c"].rounds, dict(periods["c"].steps)) == (3, {1: 10, 2: 10})
    assert periods.keys() == {"a", "c"}
