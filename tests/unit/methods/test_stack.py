from __future__ import annotations

import json

import pytest

from tesserafl.methods._stack import Stack

STACK = Stack(order=(0, 1, 2))


def test_paths_of_the_first_round_lie_at_equal_distances() -> None:
    stack = Stack(order=(0, 1, 2, 3, 4))
    assert stack.path(7, 5) == (0, 1, 2, 3, 4)
    assert stack.path(7, 3) == (0, 2, 4)
    assert stack.path(7, 1) == (0,)
    assert stack.path(7, 9) == (0, 1, 2, 3, 4)


def test_a_block_is_put_in_behind_its_origin() -> None:
    grown = STACK.hearing({0: 6, 1: 6, 2: 6}, 6).with_block(
        3, origin=1, after=1, members={5: (0, 3, 2), 2: (0, 3, 2)}, part=1 / 3, round=9
    )
    assert grown.order == (0, 1, 3, 2)
    assert grown.path(5, 3) == (0, 3, 2) and grown.path(4, 3) == (0, 1, 2)
    assert grown.born == {3: 9} and grown.founders == (0, 1, 2)
    assert grown.families == [[0], [1, 3], [2]]
    assert grown.shares(3) == {0: 1.0, 1: pytest.approx(2 / 3), 3: pytest.approx(1 / 3), 2: 1.0}
    again = grown.with_block(4, origin=3, after=3, members={5: (0, 4, 2)}, part=0.5, round=12)
    assert again.families == [[0], [1, 3, 4], [2]] and again.path(5, 3) == (0, 4, 2)


def test_a_block_may_be_the_first() -> None:
    grown = STACK.with_block(3, origin=0, after=-1, members={1: (3, 1, 2)}, part=0.5, round=0)
    assert grown.order == (3, 0, 1, 2) and grown.path(1, 3) == (3, 1, 2)


@pytest.mark.parametrize(
    ("asked", "held"),
    [
        ((0, 2), (0, 2)),
        ((2, 0), (1, 2)),
        ((0, 0), (0, 1)),
        ((2, 2), (1, 2)),
        ((1, 1, 2), (0, 1, 2)),
    ],
)
def test_a_path_out_of_order_moves_to_the_next_blocks(
    asked: tuple[int, ...], held: tuple[int, ...]
) -> None:
    assert STACK.with_path(1, asked).path(1, len(asked)) == held


def test_a_path_of_blocks_that_are_not_in_use_is_refused() -> None:
    assert STACK.with_path(1, (0, 9)) is STACK
    assert STACK.with_path(1, (0, 1, 2, 2)) is STACK


def test_who_always_held_all_scales_nothing() -> None:
    stack = STACK
    for weight in (7, 11, 3):
        stack = stack.hearing(dict.fromkeys(stack.order, weight), weight)
    assert stack.shares(3) == {0: 1.0, 1: 1.0, 2: 1.0}


def test_before_anybody_answered_shares_are_those_of_a_random_part() -> None:
    assert STACK.shares(2) == dict.fromkeys((0, 1, 2), pytest.approx(2 / 3))


def test_what_was_held_lately_counts_more() -> None:
    stack = STACK.hearing({0: 10, 1: 10, 2: 10}, 10).hearing({0: 10, 1: 10}, 10)
    assert stack.shares(3) == {0: 1.0, 1: 1.0, 2: pytest.approx(9 / 19)}


def test_a_block_is_taken_out() -> None:
    grown = STACK.hearing({0: 6, 1: 6, 2: 6}, 6).with_block(
        3, origin=1, after=1, members={5: (0, 3, 2)}, part=1 / 3, round=9
    )
    left = grown.without(3, into=1)
    assert left.order == (0, 1, 2) and left.path(5, 3) == (0, 1, 2)
    assert left.shares(3) == dict.fromkeys((0, 1, 2), pytest.approx(1.0))
    gone = grown.without(2)
    assert gone.order == (0, 1, 3) and gone.path(5, 3) == (0, 1, 3)


def test_who_held_both_of_two_blocks_gets_another() -> None:
    stack = Stack(order=(0, 1, 2, 3), paths={8: (1, 2)})
    assert stack.without(2, into=1).path(8, 2) == (1, 3)


def test_a_stack_survives_json() -> None:
    stack = Stack(
        order=(0, 2, 1),
        origin={2: 0},
        born={2: 5},
        paths={3: (0, 2)},
        held={0: 1.5, 2: 0.5},
        heard=2.0,
        spread=(0.1, 0.01),
        unrest={0: 0.4},
        sizes={0: 1.5},
        close={1: 2},
    )
    assert Stack.from_notes(json.loads(json.dumps(stack.to_notes()))) == stack
    assert Stack.from_notes(json.loads(json.dumps(STACK.to_notes()))) == STACK
