"""From an experiment to its federation: a server, or peers and the network between them."""

from __future__ import annotations

from tesserafl.core.errors import ConfigError
from tesserafl.core.method import State, Topology
from tesserafl.engines.federation import Federation, Star
from tesserafl.engines.fleet_file import names_edges
from tesserafl.engines.lean import lean
from tesserafl.engines.network import Exchange, Network, NetworkSettings
from tesserafl.engines.replicas import replicas
from tesserafl.run.experiment import Experiment, name_of
from tesserafl.run.setup import Setup

_MOST_LINKS = 2000
"""Links that a run's record names and its report draws."""


def topology_of(experiment: Experiment) -> Topology:
    """The experiment's own choice, or what its fleet and its method are made for.

    Raises:
        ConfigError: a method is made for a tree, and the fleet has no edges.
    """
    asked = experiment.network.topology
    if asked != "auto":
        return asked
    if has_edges(experiment):
        return "tree"
    if experiment.method.topology == "tree":
        raise no_edges(experiment)
    return experiment.method.topology


def has_edges(experiment: Experiment) -> bool:
    """Whether the experiment's fleet has edges."""
    fleet = experiment.fleet
    return fleet.edges > 0 or (fleet.file is not None and names_edges(fleet.file))


def no_edges(experiment: Experiment) -> ConfigError:
    """A tree without edges."""
    return ConfigError(
        f"method {name_of('method', experiment.method)!r} on a tree needs edges and devices; add "
        f"fleet.profiles and fleet.edges, or a fleet.file with edges (docs/howto/fleets.md), or "
        f"serve it to real ones (docs/howto/edge-tier.md)"
    )


def exchange_of(experiment: Experiment) -> Exchange:
    """How peers exchange: the experiment's own choice, or what its method is made for."""
    if experiment.network.exchange != "auto":
        return experiment.network.exchange
    made_for: Exchange = getattr(experiment.method, "exchange", "all_gather")
    return made_for


def network_of(setup: Setup) -> Network:
    """The graph of the experiment's clients."""
    experiment = setup.experiment
    return Network(settings=experiment.network, peers=len(setup.clients), seed=experiment.seed)


def federate(setup: Setup, state: State) -> Federation:
    """Who holds the model, beginning with `state`.

    Raises:
        ConfigError: the network cannot carry what the experiment asks for, or the method sends
            nothing that could be compressed.
    """
    experiment = setup.experiment
    method, settings = experiment.method, experiment.network
    topology = topology_of(experiment)
    experiment.compression.check(method, topology)
    if topology != "peers":
        if settings not in (NetworkSettings(), NetworkSettings(topology=settings.topology)):
            raise ConfigError(
                "network.* describes the links between peers, and this run has a server; add "
                "--network.topology peers, or leave the others away"
            )
        return Star(
            model=setup.model, method=method, state=state, compression=experiment.compression
        )
    network, exchange = network_of(setup), exchange_of(experiment)
    if exchange != "gossip" and not network.connected:
        raise ConfigError(
            f"network.exchange {exchange!r} brings messages to every peer, but the graph is in "
            f"pieces; add links, or use --network.exchange gossip"
        )
    if exchange == "gossip" and experiment.clients_per_round != network.peers:
        raise ConfigError(
            f"peers that gossip all take part in every round; set clients_per_round to "
            f"{network.peers} (it is {experiment.clients_per_round})"
        )
    if state.extra and (exchange == "gossip" or not network.reliable):
        raise ConfigError(
            f"method {name_of('method', method)!r} averages tensors beside the model's, which must "
            f"be the same everywhere: peers need every message of every round (network.exchange "
            f"'all_gather', and loss, delay and failure 0)"
        )
    if exchange != "lean":
        gossip = exchange == "gossip"
        return replicas(setup.model, method, network, gossip, state)
    if not network.reliable:
        raise ConfigError(
            f"peers that keep only a part hand it on and need every message: network.exchange "
            f"'lean' goes with loss, delay and failure 0 (they are {settings.loss}, "
            f"{settings.delay}, {settings.failure}); use 'all_gather' on such a network"
        )
    if not method.entrywise:
        raise ConfigError(
            f"method {name_of('method', method)!r} with these settings looks at the model as a "
            f"whole; network.exchange 'lean' is for methods that average entry by entry"
        )
    return lean(setup.model, method, network, setup.cohort, state)


def links_of(setup: Setup) -> list[list[int]] | None:
    """The graph's links of peers, each once; None where there are none, or too many to look at."""
    if topology_of(setup.experiment) != "peers":
        return None
    links = sorted(sorted(edge) for edge in network_of(setup).graph.edges)
    return links if len(links) <= _MOST_LINKS else None
