"""Small trees in virtual time, for methods that decide when nodes synchronise."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tesserafl.core import seeds
from tesserafl.core.coverage import Coverage
from tesserafl.core.decisions import Deciding
from tesserafl.core.fit import Training
from tesserafl.core.params import Params
from tesserafl.core.policy import HEADER, TENSORS, Basis, Policy, policy_files
from tesserafl.data import DataSettings
from tesserafl.engines.clock import ClockSettings
from tesserafl.engines.fleet import FleetSettings
from tesserafl.methods import Hwamei, MethodSettings, Tomtit
from tesserafl.models import MLP
from tesserafl.run.begin import first_federation
from tesserafl.run.experiment import Experiment
from tesserafl.run.player import Clocked, player_of
from tesserafl.run.setup import make_engine, prepare

EDGES = ("edge-0", "edge-1")


def experiment(method: MethodSettings, edges: int = 2, rounds: int = 3) -> Experiment:
    """Four devices of two classes, at two edges one of which is far away."""
    return Experiment(
        data=DataSettings(num_clients=4, partition="dirichlet", alpha=0.5),
        model=MLP(hidden=(4,)),
        method=method,
        training=Training(lr=0.1, batch_size=8, steps=1),
        fleet=FleetSettings(
            profiles=("raspberry-pi-4", "laptop"),
            edges=edges,
            backhauls=("fibre", "overseas-congested"),
            load=(0.1, 0.8),
            load_minutes=0.005,
        ),
        clock=ClockSettings(),
        rounds=rounds,
        clients_per_round=4,
    )


def played(asked: Experiment) -> Clocked:
    """The player after its last round."""
    setup = prepare(asked)
    with contextlib.closing(make_engine(setup)) as engine:
        federation = first_federation(setup)
        player = player_of(setup, engine, federation, setup.costs())
        coverage = Coverage({n: tuple(t.shape) for n, t in federation.shapes.items()})
        while not player.over:
            player.play(coverage)
    assert isinstance(player, Clocked)
    return player


def params_of(player: Clocked) -> Params:
    """The cloud's model."""
    return player.timed.federation.assembled().params


def basis_for(method: MethodSettings, components: int = 2) -> Basis:
    """Any basis for the model of `experiment`."""
    shapes = prepare(experiment(method)).model.shapes
    draw = seeds.generator(0, "basis")
    return Basis(
        mean={name: torch.zeros(shape) for name, shape in sorted(shapes.items())},
        components={
            name: torch.randn(components, *shape, generator=draw)
            for name, shape in sorted(shapes.items())
        },
        scale=2.0,
    )


def always(method: Tomtit | Hwamei, rounds: int, steps: int, folder: Path) -> Tomtit | Hwamei:
    """The method with a policy that chooses these periods for everybody, whatever it sees."""
    basis = basis_for(method)
    actor = decided_by_shifts(method, basis, rounds, steps)
    return with_policy(method, basis, actor, folder)


def decided_by_shifts(method: Deciding, basis: Basis, rounds: int, steps: int) -> Params:
    """An actor whose last layers see nothing."""
    actor = method.first_actor(basis.num_components, EDGES, 0)
    for name, choice, most in (
        ("rounds", rounds, method.options.most_rounds),
        ("steps", steps, method.options.most_steps),
    ):
        last = max(n for n in actor if n.startswith(name) and n.endswith("shift"))
        actor[last] = torch.zeros_like(actor[last])
        actor[last].view(-1, most)[:] = rising(torch.eye(most)[choice - 1])
        matrix = last.replace("shift", "matrix")
        actor[matrix] = torch.zeros_like(actor[matrix])
    return actor


def rising(logits: Tensor) -> Tensor:
    """What an actor's last layer answers for these logits: how much more than the one below."""
    return torch.diff(logits, prepend=logits.new_zeros(1))


def with_policy(
    method: Tomtit | Hwamei, basis: Basis, actor: Params, folder: Path
) -> Tomtit | Hwamei:
    """The method, with this policy in a folder."""
    options = method.options
    policy = Policy(
        method=method.name,
        options={
            "most_rounds": options.most_rounds,
            "most_steps": options.most_steps,
            "unit": options.unit,
            "each": options.each,
        },
        edges=EDGES,
        actor=actor,
        basis=basis,
    )
    write(policy, folder)
    return replace(method, policy=folder)


def write(policy: Policy, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in zip((TENSORS, HEADER), policy_files(policy), strict=True):
        (folder / name).write_bytes(data)
