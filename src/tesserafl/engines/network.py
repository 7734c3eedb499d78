"""Who hears whom: the graph of the peers, and what its links do to messages.

Every peer can work all of it out by itself: draws follow from the seed, the round and the sender.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import networkx as nx
import torch

from tesserafl.core import seeds
from tesserafl.core.errors import CheckpointError, ConfigError

Exchange = Literal["all_gather", "lean", "gossip"]
_GRAPHS = 100
"""Random graphs that are drawn in search of a connected one."""
_GRAINS = 1 << 16
"""Unequal mixing weights are multiples of 1 / this."""


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """How participants are connected; only peers have a graph and links of their own."""

    topology: Literal["auto", "star", "tree", "peers"] = "auto"
    """a server and its clients; a cloud, the edges of the fleet and their devices; or peers without
    a server; auto: a tree if the fleet has edges, else what the method is made for"""
    graph: Literal["complete", "ring", "erdos_renyi", "file"] = "complete"
    """which peers are linked"""
    probability: float = 0.3
    """erdos_renyi: probability of each link"""
    file: Path | None = None
    """file: an edge list, two peers a line, counted from 0"""
    exchange: Literal["auto", "all_gather", "lean", "gossip"] = "auto"
    """all_gather: messages reach everybody, over other peers where there is no link, and all keep
    equal copies of the model; lean: a peer receives and keeps only its next part; gossip: peers
    average with their neighbours; auto takes what the method is made for, else all_gather"""
    loss: float = 0.0
    """probability that a message is lost on a link"""
    delay: float = 0.0
    """probability that a message arrives a round late (and again for the next round)"""
    failure: float = 0.0
    """probability that a link is down for a round, in both directions"""

    def __post_init__(self) -> None:
        for name in ("loss", "delay", "failure", "probability"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(
                    f"network.{name} is a probability, in [0, 1]; got {getattr(self, name)}"
                )
        if self.delay == 1.0:
            raise ConfigError("network.delay 1 means that no message ever arrives; use less")
        if (self.graph == "file") != (self.file is not None):
            raise ConfigError(
                f"network.graph is {self.graph!r} and network.file is {self.file}; a file "
                f"goes with --network.graph file, and with nothing else"
            )


class Hop(NamedTuple):
    """A message's way to one receiver."""

    sender: int
    """Who handed it on: its origin, or a peer on the way."""
    arrived: bool
    late: int
    """Rounds that it comes late."""


@dataclass(kw_only=True)
class Network:
    """The graph and its links, round by round."""

    settings: NetworkSettings
    peers: int
    seed: int
    graph: nx.Graph = field(init=False)

    def __post_init__(self) -> None:
        self.graph = _graph(self.settings, self.peers, self.seed)

    @property
    def reliable(self) -> bool:
        """Whether every message arrives at once."""
        return not (self.settings.loss or self.settings.delay or self.settings.failure)

    @property
    def connected(self) -> bool:
        """Whether there is a way between any two peers."""
        return bool(nx.is_connected(self.graph))

    @property
    def digest(self) -> str:
        """Equal for equal graphs."""
        edges = sorted(sorted(edge) for edge in self.graph.edges)
        return hashlib.sha256(repr(edges).encode()).hexdigest()

    def refuse_others(self, digest: str) -> None:
        """Raise CheckpointError unless a checkpoint's graph is this one."""
        if digest != self.digest:
            raise CheckpointError(
                f"the checkpoint is of another graph than this one ({self.settings.graph}); was "
                f"{self.settings.file or 'config.json'} changed? Put it back, or run it into a new "
                f"folder"
            )

    def neighbours(self, peer: int) -> list[int]:
        """Peers that it has a link to, ascending."""
        return sorted(self.graph[peer])

    def links(self, round: int) -> nx.Graph:
        """The graph without the links that are down in this round."""
        if not self.settings.failure:
            return self.graph
        edges = sorted(tuple(sorted(edge)) for edge in self.graph.edges)
        draw = torch.rand(len(edges), generator=seeds.generator(self.seed, round, "links"))
        up = nx.Graph()
        up.add_nodes_from(range(self.peers))
        up.add_edges_from(
            edge
            for edge, luck in zip(edges, draw.tolist(), strict=True)
            if luck >= self.settings.failure
        )
        return up

    def journeys(self, round: int, origin: int, relayed: bool) -> dict[int, Hop]:
        """The ways of one message, receiver -> its last hop, in the order of sending.

        Args:
            round: when it is sent.
            origin: who sends it.
            relayed: to everybody along shortest ways, peers hand it on; else to neighbours alone.
                Who would get it from a peer that did not get it is left out.
        """
        links = self.links(round)
        lost = self._draw(round, origin, "loss")
        delays = self._draw(round, origin, "delay")
        hops: dict[int, Hop] = {}
        reached, front = {origin}, [origin]
        while front:
            following = []
            for sender in front:
                for receiver in sorted(links[sender]):
                    if receiver in reached:
                        continue
                    reached.add(receiver)
                    arrived = lost[receiver] >= self.settings.loss
                    # Nobody hands on what it does not have yet.
                    late = hops[sender].late if sender in hops else 0
                    if self.settings.delay and delays[receiver] > 0:
                        late += int(math.log(delays[receiver]) / math.log(self.settings.delay))
                    hops[receiver] = Hop(sender, arrived, late)
                    if arrived:
                        following.append(receiver)
            front = following if relayed else []
        return hops

    def mixing(self, round: int, peer: int) -> dict[int, int]:
        """Integer weights with which a peer averages itself and its neighbours.

        Metropolis weights, 1 / (1 + max of both degrees) and the rest for itself: symmetric, so
        the average over all peers is kept (Xiao, Boyd and Kim, J. Parallel Distrib. Comput. 2007).
        All 1 where everybody has equally many neighbours.
        """
        links = self.links(round)
        degree = dict(links.degree)
        if len(set(degree.values())) == 1:
            return {other: 1 for other in (peer, *sorted(links[peer]))}
        weights = {
            other: _GRAINS // (1 + max(degree[peer], degree[other]))
            for other in sorted(links[peer])
        }
        return {peer: _GRAINS - sum(weights.values()), **weights}

    def _draw(self, round: int, origin: int, purpose: str) -> list[float]:
        draw = seeds.generator(self.seed, round, origin, purpose)
        numbers: list[float] = torch.rand(self.peers, generator=draw).tolist()
        return numbers


def _graph(settings: NetworkSettings, peers: int, seed: int) -> nx.Graph:
    graph = nx.Graph()
    graph.add_nodes_from(range(peers))
    if settings.graph == "complete":
        return nx.complete_graph(peers)
    if settings.graph == "ring":
        graph.add_edges_from((n, (n + 1) % peers) for n in range(peers) if peers > 1)
    elif settings.graph == "erdos_renyi":
        return _random(settings.probability, peers, seed)
    else:
        graph.add_edges_from(_edges(settings, peers))
    return graph


def _random(probability: float, peers: int, seed: int) -> nx.Graph:
    for number in range(_GRAPHS):
        graph = nx.gnp_random_graph(peers, probability, seed=seeds.derive(seed, "graph", number))
        if nx.is_connected(graph):
            return graph
    raise ConfigError(
        f"none of {_GRAPHS} random graphs of {peers} peers with network.probability {probability} "
        f"is connected; raise it (about {math.log(max(2, peers)) / peers:.2f} is where they begin "
        f"to be)"
    )


def _edges(settings: NetworkSettings, peers: int) -> list[tuple[int, int]]:
    assert settings.file is not None
    edges = []
    try:
        lines = settings.file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"network.file {settings.file} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            one, other = map(int, words)
        except ValueError:
            raise ConfigError(
                f"{settings.file}, line {number}: {line!r} is not a link; write two peers, "
                f"for instance '0 3'"
            ) from None
        if one == other or not (0 <= one < peers and 0 <= other < peers):
            raise ConfigError(
                f"{settings.file}, line {number}: {line!r}; a link joins two different peers of "
                f"0 to {peers - 1}"
            )
        edges.append((one, other))
    return edges
