"""Who keeps what among lean peers, against tables of all peers by all entries; and its bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tesserafl.core.errors import CheckpointError
from tesserafl.core.fit import Training
from tesserafl.core.messages import Client, Task, Update
from tesserafl.core.method import State
from tesserafl.core.model import Model
from tesserafl.data import Spec
from tesserafl.engines import shares as shares_module
from tesserafl.engines.lean import lean, store_of
from tesserafl.engines.lean_peer import LeanPeer
from tesserafl.engines.network import Network, NetworkSettings
from tesserafl.engines.peer import Asked, Heard
from tesserafl.engines.shares import Averaging, Shares, first_shares
from tesserafl.methods import FederatedDropout, FedRolex, HeteroFL, MSfusion
from tesserafl.models import MLP

METHODS: dict[str, Averaging] = {
    "msfusion": MSfusion(ratio=(0.5, 0.25), contrast=0.0, stride=3),
    "staggered": MSfusion(ratio=(0.25,), contrast=0.0, stride=3, layer_phase="staggered"),
    "heterofl": HeteroFL(ratio=(0.5, 0.25)),
    "dropout": FederatedDropout(ratio=(0.25,)),
    "fedrolex": FedRolex(ratio=(0.25,)),
}
ROUNDS = 6
Bools = npt.NDArray[np.bool_]


def model_of(hidden: int) -> Model:
    spec = Spec(kind="vector", task="vector-classification", shape=(12,), num_classes=5)
    return MLP(hidden=(hidden, hidden)).build_model(spec)


def begun(
    method: Averaging, peers: int, hidden: int = 16, cohort: int | None = None
) -> tuple[Shares, State]:
    """The first shares of peers of whom so many take part in a round, and the first state."""
    clients = [Client(id=number, num_examples=number + 1) for number in range(peers)]

    def cohorts(round: int) -> Sequence[Client]:
        return [clients[(round + step) % peers] for step in range(cohort or peers)]

    model = model_of(hidden)
    state = method.init(model, 0, ROUNDS)
    return first_shares(model, method, peers, cohorts, state), state


def table(shares: Shares) -> Bools:
    """[peers, entries]"""
    masks = [shares.keeps(number).numpy() for number in range(len(shares.strips))]
    return np.concatenate(masks, axis=1)


def trained(shares: Shares) -> Bools:
    """[peers, entries], read off from a model whose entries are their numbers."""
    found = np.zeros((shares.peers, shares.model.num_entries), dtype=bool)
    if shares.state.round == shares.state.rounds:
        return found
    numbers, first = {}, 0
    for name, shape in shares.model.shapes.items():
        numbers[name] = torch.arange(first, first + int(np.prod(shape))).reshape(shape)
        first += int(np.prod(shape))
    state = replace(shares.state, params=numbers)
    cohort = shares.cohorts(state.round)
    for task in shares.method.configure(shares.model, state, cohort, Training()):
        for tensor in task.params.values():
            found[task.client.id, tensor.reshape(-1).numpy()] = True
    return found


def given_out(had: Bools, trains: Bools) -> Bools:
    """By the rule, on whole tables."""
    keeps = trains.copy()
    for entry in np.flatnonzero(~trains.any(axis=0)):
        holders = np.flatnonzero(had[:, entry])
        keeps[holders[entry % len(holders)], entry] = True
    return keeps


@pytest.fixture(autouse=True)
def _many_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares_module, "_TABLE", 300)


@pytest.mark.parametrize("cohort", [None, 2])
@pytest.mark.parametrize("name", METHODS)
def test_strips_say_what_whole_tables_say(name: str, cohort: int | None) -> None:
    shares, _ = begun(METHODS[name], 4, cohort=cohort)
    total = shares.model.num_entries
    assert len(shares.strips) > 4
    begin = np.arange(total) * 4 // total == np.arange(4)[:, None]
    expected = given_out(begin, trained(shares))
    for _ in range(ROUNDS + 1):
        assert np.array_equal(table(shares), expected)
        assert [shares.num_kept(peer) for peer in range(4)] == expected.sum(axis=1).tolist()
        if shares.state.round == ROUNDS:
            break
        shares = shares.following
        expected = given_out(expected, trained(shares))
    assert not trained(shares).any() and (expected.sum(axis=0) == 1).all()


def update_of(task: Task) -> Update:
    names = task.params.keys() if task.trainable is None else task.trainable
    delta = {name: 0.5 * task.params[name] + 1.0 for name in sorted(names)}
    return Update(
        round=task.round,
        client=task.client.id,
        submodel=task.submodel,
        delta=delta,
        num_examples=1,
        num_steps=1,
        metrics={},
    )


def test_what_is_handed_over_is_in_the_models_order_and_no_more_than_is_needed() -> None:
    shares, state = begun(METHODS["msfusion"], 4)
    flat = torch.cat([tensor.reshape(-1) for tensor in state.params.values()])
    had, will, trains = table(shares), table(shares.following), trained(shares)
    first = had.argmax(axis=0)
    (task, *_) = [
        shares.filled(task, store_of(shares, task.client.id, state))
        for task in shares.tasks(shares.cohorts(0), Training())
        if task.client.id == 1
    ]
    parts = LeanPeer(client=1, shares=shares, store=store_of(shares, 1, state)).letters(
        update_of(task), Asked(shares.cohorts(0), Training())
    )
    assert parts
    for (receiver,), (_, groups) in parts:
        lent = will[receiver] & ~had[receiver] & (first == 1)
        told = will[receiver] & trains[1]
        assert torch.equal(groups["values"]["part"], flat[torch.from_numpy(lent)])
        assert torch.equal(groups["change"]["part"], 0.5 * flat[torch.from_numpy(told)] + 1.0)


def test_shares_that_were_written_are_read_again_and_others_are_refused() -> None:
    shares, _ = begun(METHODS["msfusion"], 4)
    after = shares.following.following
    again = shares.read(after.state, after.written())
    assert again.keepers == after.keepers and np.array_equal(table(again), table(after))
    for other, _ in (begun(METHODS["msfusion"], 4, hidden=20), begun(METHODS["msfusion"], 9)):
        with pytest.raises(CheckpointError, match="who keeps what of another model"):
            other.read(after.state, after.written())


@pytest.mark.parametrize("peers", [4, 8])
@pytest.mark.parametrize(
    ("name", "most"), [("msfusion", 0.05), ("fedrolex", 0.05), ("dropout", 0.5)]
)
def test_who_keeps_what_takes_few_bytes(
    name: str, most: float, peers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For an entry of the model, however many peers there are."""
    monkeypatch.setattr(shares_module, "_TABLE", 1 << 18)
    shares, _ = begun(METHODS[name], peers, hidden=256)
    while shares.state.round < ROUNDS:
        shares = shares.following
        assert sum(map(len, shares.keepers)) <= most * shares.model.num_entries


def folded_by_each(shares: Shares, state: State, rounds: int) -> Iterator[list[LeanPeer]]:
    """Peers after each round; each works alone on what the others wrote to it."""
    peers = [
        LeanPeer(client=peer, shares=shares, store=store_of(shares, peer, state))
        for peer in range(shares.peers)
    ]
    for round in range(rounds):
        asked = Asked(shares.cohorts(round), Training())
        tasks = [peer.task(asked) for peer in peers]
        updates = [update_of(task) for task in tasks if task is not None]
        letters = [peer.letters(update, asked) for peer, update in zip(peers, updates, strict=True)]
        for peer in peers:
            sent = {
                origin: _reads(parts)
                for origin, written in enumerate(letters)
                for (receiver,), parts in written
                if receiver == peer.client
            }
            own = updates[peer.client]
            peer.fold(Heard(own, range(shares.peers), sent), asked)
        yield peers


def _reads(parts: Any) -> Callable[[], Any]:
    return lambda: parts


@dataclass(frozen=True, kw_only=True)
class Headless(HeteroFL):
    """Its clients hold the head and do not train it."""

    def configure(self, *asked: Any) -> Iterator[Task]:
        for task in HeteroFL.configure(self, *asked):
            names = {name for name in task.params if not name.startswith("head")}
            yield replace(task, trainable=frozenset(names))


@pytest.mark.parametrize("method", [METHODS["msfusion"], Headless(ratio=(0.5,))])
def test_peers_alone_keep_what_all_together_keep(method: Averaging) -> None:
    shares, state = begun(method, 4)
    network = Network(settings=NetworkSettings(topology="peers"), peers=4, seed=0)
    together = lean(shares.model, method, network, shares.cohorts, state)
    for peers in folded_by_each(shares, state, 3):
        asked = Asked(shares.cohorts(together.round), Training())
        together.fold(asked.cohort, [update_of(task) for task in together.tasks(*asked)])
        for peer in peers:
            assert peer.round == together.round
            assert torch.equal(peer.store, together.stores[peer.client])


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made, and of the largest that holds integers."""

    def __init__(self) -> None:
        super().__init__()
        self.any = self.integers = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
                size = leaf.numel() * leaf.element_size()
                self.any = max(self.any, size)
                if not leaf.is_floating_point():
                    self.integers = max(self.integers, size)
        return out


def test_a_lean_peer_makes_no_table_of_the_model_while_it_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing larger than its part, and no list of its part's entries."""
    monkeypatch.setattr(shares_module, "_TABLE", 1 << 13)
    shares, state = begun(replace(MSfusion(), ratio=(0.25,), contrast=0.0, stride=8), 4, hidden=300)
    total = shares.model.num_entries
    kept = 4 * max(shares.num_kept(peer) for peer in range(4))
    assert kept < 4 * total / 3
    with Largest() as largest:
        for peers in folded_by_each(shares, state, 3):
            kept = max(kept, *(4 * len(peer.store) for peer in peers))
    assert largest.any <= 1.1 * kept
    assert largest.integers <= 9 * (1 << 13)  # a strip's


def test_strips_are_smaller_the_more_peers_there_are() -> None:
    few, many = (
        max(strip.size for strip in begun(METHODS["msfusion"], peers)[0].strips) for peers in (2, 8)
    )
    assert many <= 300 // 8 and 300 // 2 >= few > many
