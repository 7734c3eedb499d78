"""Unequal devices under five edges: who is fastest, and who spends least energy.

40 devices of four classes whose load switches between five levels, and two kinds of backhaul; all
rows meet the same world and end at the same virtual time. Compare at equal time and equal energy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tesserafl.core.errors import ConfigError
from tesserafl.core.fit import Training
from tesserafl.data import DataSettings
from tesserafl.engines.clock import ClockSettings
from tesserafl.engines.fleet import FleetSettings
from tesserafl.engines.network import NetworkSettings
from tesserafl.experiments._sizes import base_for
from tesserafl.methods import (
    EqualFinish,
    FedAsync,
    FedAvg,
    FedBuff,
    FedNova,
    HierFAVG,
    MethodSettings,
)
from tesserafl.models import MLP
from tesserafl.run.experiment import Experiment

STEPS, ROUNDS = (2, 5, 10), (1, 2, 5)
"""kappa_1 and kappa_2 of the grid of fixed periods."""
LOAD = (0.1, 0.25, 0.4, 0.6, 0.8)
"""Hwamei's range of loads."""


def fleet_comparison(data: DataSettings | None = None) -> Experiment:
    """What the rows share: devices, edges, data, model, and when it ends."""
    base = base_for(data, HierFAVG(local_steps=5))
    packaged = data is None
    return replace(
        base,
        data=replace(base.data, num_clients=40, alpha=0.5),
        model=MLP(hidden=(128,), norm="layer") if packaged else base.model,
        training=Training(lr=0.05, batch_size=8) if packaged else base.training,
        fleet=FleetSettings(
            profiles=("raspberry-pi-4", "raspberry-pi-5", "phone", "laptop"),
            edges=5,
            backhauls=("fibre", "overseas-congested"),
            load=LOAD,
        ),
        clock=ClockSettings(horizon_seconds=120.0 if packaged else 7200.0),
        rounds=1000,
        clients_per_round=40,
        checkpoint_every=100,
    )


def rows(base: Experiment, asked: frozenset[str]) -> Mapping[str, Experiment]:
    """Stars that wait in every way, trees with every fixed period, and the heuristic.

    Raises:
        ConfigError: there are no edges or no end.
    """
    if not base.fleet.is_there or base.clock.horizon_seconds is None:
        raise ConfigError(
            "fleet_comparison compares at a virtual time on a tree: it needs fleet.edges (or "
            "fleet.file) and clock.horizon_seconds"
        )
    devices, horizon = base.clients_per_round, base.clock.horizon_seconds
    star = replace(base, network=NetworkSettings(topology="star"))
    some = max(1, devices // 4)

    def waiting(method: MethodSettings, clock: ClockSettings, buffer: int = devices) -> Experiment:
        # Of a smaller buffer more models are made; as many evaluations are enough.
        more = devices // buffer
        return replace(
            star,
            method=method,
            clock=replace(clock, horizon_seconds=horizon),
            evaluate_every=base.evaluate_every * more,
            rounds=base.rounds * more,
        )

    semi = ClockSettings(mode="semi-synchronous", quorum=0.7)
    over = ClockSettings(mode="semi-synchronous", over_selection=0.5, late="refuse")
    free = ClockSettings(mode="asynchronous")
    experiments = {
        "fedavg": waiting(FedAvg(), ClockSettings()),
        "fedavg-refuse": waiting(FedAvg(), replace(semi, late="refuse")),
        "fedavg-bank": waiting(FedAvg(), semi),
        "fedavg-over-selection": replace(
            waiting(FedAvg(), over), clients_per_round=max(1, devices * 2 // 3)
        ),
        "fednova": waiting(FedNova(), ClockSettings()),
        "fedbuff": waiting(FedBuff(), replace(free, buffer=some), some),
        "fedasync": waiting(FedAsync(), replace(free, buffer=1), 1),
    }
    for steps in STEPS:
        for rounds in ROUNDS:
            method = HierFAVG(local_steps=steps, edge_rounds=rounds)
            experiments[f"hierfavg-{steps}-{rounds}"] = replace(base, method=method)
    experiments["equal_finish"] = replace(base, method=EqualFinish())
    experiments["equal_finish-normalised"] = replace(base, method=EqualFinish(normalised=True))
    return experiments
