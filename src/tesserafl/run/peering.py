"""What peers would store, send and train: the network played without training, for `plan`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from rich.table import Table

from tesserafl.core.coverage import Coverage
from tesserafl.core.messages import Client, Task, Update
from tesserafl.core.method import State
from tesserafl.core.model import Model
from tesserafl.core.submodel import index_tensor
from tesserafl.core.windows import kept
from tesserafl.engines.federation import Federation
from tesserafl.methods import MSfusion
from tesserafl.run.costs import CostTable
from tesserafl.run.federate import exchange_of, federate, network_of
from tesserafl.run.setup import Setup

_ROUNDS = 5
"""Rounds of the schedule that are looked at, evenly spread."""
_PARTICIPANTS = (2, 5, 10, 20, 50, 100)


@dataclass(frozen=True, kw_only=True)
class Union:
    """What all participants of a round hold together."""

    round: int
    """From 0."""
    overlap: float | None
    """c, for methods that have one."""
    analytic: float | None
    """Share of an axis's units by the method's formula, where it has one."""
    counted: float
    """The same, counted: the mean over the axes."""
    entries: float
    """Share of the model's entries."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """A participant's cost if as many take part, at the narrowest width that covers every axis."""

    participants: int
    ratio: float
    num_entries: int
    flops_per_example: float
    bytes_sent: int
    """In a round of all-gather between all."""


@dataclass(frozen=True, kw_only=True)
class Peering:
    """The network, and what a participant has to do with it."""

    graph: str
    exchange: str
    links: tuple[int, int]
    """Fewest and most neighbours of a peer."""
    stored: int | None
    """Entries that a peer keeps between rounds, at most; beside them it trains its part."""
    bytes_sent: tuple[float, int]
    """Of a peer in the first round: mean and most."""
    bytes_received: tuple[float, int]
    unions: tuple[Union, ...]
    shares: tuple[Share, ...]


def peering_of(setup: Setup, state: State, costs: CostTable) -> Peering:
    """Look at the first round of the network, and at the schedule of all."""
    experiment = setup.experiment
    network = network_of(setup)
    federation = federate(setup, state)
    folded = federation.fold(setup.cohort(0), _untrained(setup, federation))
    sent = [each.sent for each in folded.traffic.values()]
    received = [each.received for each in folded.traffic.values()]
    degrees = [len(network.neighbours(peer)) for peer in range(network.peers)]
    last = experiment.rounds - 1
    rounds = sorted({round(last * step / (_ROUNDS - 1)) for step in range(_ROUNDS)})
    bare = replace(state, params={n: t.to("meta") for n, t in state.params.items()})
    return Peering(
        graph=experiment.network.graph,
        exchange=exchange_of(experiment),
        links=(min(degrees), max(degrees)),
        stored=folded.stored,
        bytes_sent=(sum(sent) / len(sent), max(sent)),
        bytes_received=(sum(received) / len(received), max(received)),
        unions=tuple(_union(setup, replace(bare, round=number)) for number in rounds),
        shares=tuple(_shares(setup, bare, costs)),
    )


def described(peering: Peering, num_entries: int) -> Iterator[str | Table]:
    """The peers' part of a plan, for a terminal; `num_entries` of the whole model."""
    few, many = peering.links
    neighbours = str(few) if few == many else f"{few} to {many}"
    stored = peering.stored or 0
    yield (
        f"Peers: graph {peering.graph}, {neighbours} neighbours each, exchange {peering.exchange}; "
        f"a peer stores {stored:,} parameters ({stored / num_entries:.1%}) between rounds, sends "
        f"{peering.bytes_sent[0] / 1e6:.3g} MB a round (most {peering.bytes_sent[1] / 1e6:.3g}) "
        f"and receives {peering.bytes_received[0] / 1e6:.3g} (most "
        f"{peering.bytes_received[1] / 1e6:.3g})"
    )
    table = Table("round", "overlap c", "union of units, analytic", "counted", "of parameters")
    for union in peering.unions:
        table.add_row(
            str(union.round + 1),
            "-" if union.overlap is None else f"{union.overlap:.2f}",
            "-" if union.analytic is None else f"{union.analytic:.1%}",
            f"{union.counted:.1%}",
            f"{union.entries:.1%}",
        )
    yield table
    if peering.shares:
        yield "At the width with which as many just cover every axis, by the formula (first round):"
        table = Table(
            "participants", "ratio", "parameters", "share", "MFLOP an example", "MB, all to all"
        )
        for share in peering.shares:
            table.add_row(
                str(share.participants),
                f"{share.ratio:.3g}",
                f"{share.num_entries:,}",
                f"{share.num_entries / num_entries:.1%}",
                f"{share.flops_per_example / 1e6:.3g}",
                f"{share.bytes_sent / 1e6:.3g}",
            )
        yield table


def _untrained(setup: Setup, federation: Federation) -> Iterator[Update]:
    """Updates of the first round of the size that they would have, with nothing changed."""
    experiment = setup.experiment
    for task in federation.tasks(setup.cohort(0), experiment.training):
        yield Update(
            round=task.round,
            client=task.client.id,
            submodel=task.submodel,
            delta={name: torch.zeros_like(tensor) for name, tensor in task.params.items()},
            num_examples=task.client.num_examples,
            num_steps=0,
            metrics={},
        )


def _union(setup: Setup, state: State) -> Union:
    experiment, model = setup.experiment, setup.model
    method, cohort = experiment.method, setup.cohort(state.round)
    tasks = list(method.configure(model, state, cohort, experiment.training))
    coverage = Coverage({name: tuple(t.shape) for name, t in state.params.items()})
    coverage.add([task.submodel for task in tasks])
    shifting = method if isinstance(method, MSfusion) else None
    plain = shifting and shifting.layer_phase == "same"  # what the formula is for
    return Union(
        round=state.round,
        overlap=None if shifting is None else shifting.overlap_of(state, cohort),
        analytic=shifting.union_of(state, cohort) if shifting and plain else None,
        counted=_counted(method.predictor(model, state).model, tasks),
        entries=coverage.share,
    )


def _counted(model: Model, tasks: Sequence[Task]) -> float:
    """Mean over the axes of the share of units that some task keeps."""
    held = {axis: set[int]() for axis in model.cuttable}
    for task in tasks:
        for axis, units in kept(model, task.submodel).items():
            held[axis] |= set(index_tensor(units).tolist())
    shares = [len(units) / model.units(axis) for axis, units in held.items()]
    return sum(shares) / len(shares) if shares else 1.0


def _shares(setup: Setup, state: State, costs: CostTable) -> Iterator[Share]:
    """For methods whose windows can be made to cover an axis: mu (1 + (N - 1) (1 - c)) = 1."""
    method, training = setup.experiment.method, setup.experiment.training
    if not isinstance(method, MSfusion):
        return
    overlap = method.overlap_of(state, setup.cohort(0))
    for count in _PARTICIPANTS:
        ratio = 1.0 / (1.0 + (count - 1) * (1.0 - overlap))
        clients = [Client(id=number, num_examples=1) for number in range(count)]
        narrow = replace(method, ratio=(ratio,), contrast=0.0)
        task = next(iter(narrow.configure(setup.model, state, clients, training)))
        cost = costs.of(task)
        yield Share(
            participants=count,
            ratio=ratio,
            num_entries=cost.num_entries,
            flops_per_example=cost.flops_per_example,
            bytes_sent=(count - 1) * cost.bytes_each_way,
        )
