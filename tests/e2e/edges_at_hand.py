"""A tree in this process: edges behind the cloud's post, devices behind the edges' own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from devices_at_hand import PostAtHand, parts

from tesserafl.core.method import State
from tesserafl.core.model import Model
from tesserafl.core.schedule import Periods, Situation
from tesserafl.engines.federation import Federation, Star
from tesserafl.engines.fleet import FleetSettings
from tesserafl.engines.fleet_file import fleet_of
from tesserafl.engines.remote import Remote
from tesserafl.engines.seam import Engine
from tesserafl.run.begin import first_federation
from tesserafl.run.costs import CostTable
from tesserafl.run.deployed import Deployment, begin
from tesserafl.run.edge import EdgeResident
from tesserafl.run.experiment import Experiment, to_json
from tesserafl.run.files import write_json
from tesserafl.run.hosting import Hosting
from tesserafl.run.player import Clocked, Player
from tesserafl.run.runner import play
from tesserafl.run.setup import Setup, make_engine, prepare
from tesserafl.run.tree import Tree


def at_once(remote: Remote) -> None:
    """Pauses take no time, and everybody is looked for with every task."""
    remote.clock, remote.pause = iter(range(10**6)).__next__, lambda _: None


@dataclass(kw_only=True)
class TreeAtHand:
    """Edges with so many devices each; client numbers count on from edge to edge."""

    folder: Path
    sizes: Sequence[int] = (2, 2)
    post: PostAtHand = field(init=False)
    """The cloud's."""
    posts: dict[int, PostAtHand] = field(default_factory=dict)
    """Node of an edge -> the edge's own post."""
    rounds: int = 0
    """That are done; a test counts them."""

    def __post_init__(self) -> None:
        first, residents = 0, {}
        for number, size in enumerate(self.sizes):
            clients = range(first, first + size)
            self.posts[200 + number] = PostAtHand(residents=parts(self.folder, clients))
            residents[200 + number] = self.edge(200 + number)
            first += size
        self.post = PostAtHand(residents=residents)  # type: ignore[arg-type]

    def edge(self, node: int) -> EdgeResident:
        """An edge as it starts, with what its disk has."""
        name = f"edge-{node - 200}"
        return EdgeResident(
            name=name,
            folder=self.folder / name,
            post=self.posts[node],
            hosting=Hosting(devices=self.sizes[node - 200], wait_seconds=60.0),
            watch=at_once,
        )

    def restart(self, node: int) -> None:
        """Put a new process in an edge's place."""
        self.post.residents[node] = self.edge(node)  # type: ignore[assignment]

    def orders(self, kind: str) -> int:
        """Of this kind that edges sent to their devices."""
        return sum([k for _, k, _ in post.log].count(kind) for post in self.posts.values())

    def begin(self, experiment: Experiment, **deployment: Any) -> Path:
        """The run's folder."""
        folder = self.folder / "served"
        devices = sum(self.sizes)
        begin(experiment, Deployment(devices=devices, edges=len(self.sizes), **deployment), folder)
        return folder


def events_of(folder: Path, kind: str = "round") -> list[Mapping[str, Any]]:
    """A run's events of a kind."""
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def simulated(experiment: Experiment, edges: int, folder: Path, served: Path | None = None) -> Any:
    """The summary of the same tree in virtual time, with a served run's periods if asked for."""
    fleet = FleetSettings(profiles=("phone",), edges=edges)
    setup = prepare(replace(experiment, fleet=fleet))
    folder.mkdir(parents=True)
    write_json(folder / "config.json", to_json(setup.experiment))
    schedule = getattr(experiment.method, "periods", None)
    if served is not None:
        schedule = recorded(served)

    def player(setup: Setup, engine: Engine, federation: Federation, costs: CostTable) -> Player:
        assert isinstance(federation, Star)
        return Clocked(
            timed=Tree(
                setup=setup,
                engine=engine,
                federation=federation,
                fleet=fleet_of(fleet, len(setup.clients), experiment.seed),
                costs=costs,
                schedule=schedule,
            )
        )

    return play(setup, first_federation(setup), folder, make_engine(setup), None, player)


def recorded(served: Path) -> Callable[[Model, State, Situation], Mapping[str, Periods]]:
    """The periods that a served run took from what it measured, round by round."""
    chosen = {event["round"] - 1: event["periods"] for event in events_of(served)}

    def periods(model: Model, state: State, situation: Situation) -> Mapping[str, Periods]:
        return {
            edge: Periods(
                rounds=each["rounds"], steps={int(c): n for c, n in each["steps"].items()}
            )
            for edge, each in chosen[situation.round].items()
        }

    return periods
