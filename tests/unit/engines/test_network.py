"""The graph of the peers, and what its links do to messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tesserafl.core.errors import ConfigError
from tesserafl.engines.network import Hop, Network, NetworkSettings


def network(peers: int, seed: int = 0, **settings: Any) -> Network:
    return Network(settings=NetworkSettings(**settings), peers=peers, seed=seed)


def listed(folder: Path, text: str, peers: int, **settings: Any) -> Network:
    """A network of an edge list."""
    path = folder / "links.txt"
    path.write_text(text, encoding="utf-8")
    return network(peers, graph="file", file=path, **settings)


def path_graph(folder: Path, peers: int, **settings: Any) -> Network:
    """0 - 1 - 2 - ..."""
    return listed(folder, "\n".join(f"{n} {n + 1}" for n in range(peers - 1)), peers, **settings)


def star_graph(folder: Path, peers: int, **settings: Any) -> Network:
    """0 in the middle."""
    return listed(folder, "\n".join(f"0 {n}" for n in range(1, peers)), peers, **settings)


def test_the_complete_graph_links_everybody() -> None:
    assert [network(4).neighbours(n) for n in range(4)] == [
        [1, 2, 3],
        [0, 2, 3],
        [0, 1, 3],
        [0, 1, 2],
    ]


@pytest.mark.parametrize(
    ("peers", "expected"),
    [
        (1, [[]]),
        (2, [[1], [0]]),
        (3, [[1, 2], [0, 2], [0, 1]]),
        (5, [[1, 4], [0, 2], [1, 3], [2, 4], [0, 3]]),
    ],
)
def test_a_ring_closes(peers: int, expected: list[list[int]]) -> None:
    ring = network(peers, graph="ring")
    assert [ring.neighbours(n) for n in range(peers)] == expected
    assert ring.connected


def test_random_graphs_are_connected_follow_the_seed_and_have_as_many_links_as_asked() -> None:
    graphs = [network(20, seed, graph="erdos_renyi", probability=0.3).graph for seed in range(10)]
    again = [network(20, seed, graph="erdos_renyi", probability=0.3).graph for seed in range(10)]
    assert [set(g.edges) for g in graphs] == [set(g.edges) for g in again]
    assert len({frozenset(graph.edges) for graph in graphs}) == 10
    links = sum(graph.number_of_edges() for graph in graphs) / 10
    assert links == pytest.approx(0.3 * 190, abs=9)  # 4.5 standard errors
    # 8 peers with probability 0.3 fall into pieces half of the time: those are drawn again.
    sparse = [network(8, seed, graph="erdos_renyi", probability=0.3) for seed in range(20)]
    assert all(each.connected for each in sparse)


def test_random_graphs_that_cannot_be_connected_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"network.probability 0.0 is connected; raise it.*0\.23"):
        network(10, graph="erdos_renyi", probability=0.0)


def test_a_file_lists_links_with_comments_and_empty_lines(tmp_path: Path) -> None:
    links = listed(tmp_path, "# a path\n0 1\n\n  2\t1   # back\n1 0\n", 4)
    assert [links.neighbours(n) for n in range(4)] == [[1], [0, 2], [1], []]
    assert not links.connected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 1\n1", "line 2: '1' is not a link"),
        ("0 1 2", "line 1: '0 1 2' is not a link"),
        ("0 one", "line 1: '0 one' is not a link; write two peers, for instance '0 3'"),
        ("# none\n1 1", "line 2: '1 1'; a link joins two different peers of 0 to 3"),
        ("0 4", "line 1: '0 4'; a link joins two different peers of 0 to 3"),
        ("-1 0", "two different peers"),
    ],
)
def test_a_line_that_is_no_link_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        listed(tmp_path, text, 4)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.txt cannot be read"):
        network(3, graph="file", file=tmp_path / "nowhere.txt")
    (tmp_path / "image").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ConfigError, match=r"image cannot be read"):
        network(3, graph="file", file=tmp_path / "image")


@pytest.mark.parametrize("name", ["loss", "delay", "failure", "probability"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_what_is_no_probability_is_an_error(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"network\.{name} is a probability"):
        NetworkSettings(**{name: value})  # type: ignore[arg-type]


def test_settings_that_do_not_fit_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no message ever arrives"):
        NetworkSettings(delay=1.0)
    with pytest.raises(ConfigError, match="a file goes with"):
        NetworkSettings(graph="file")
    with pytest.raises(ConfigError, match="a file goes with"):
        NetworkSettings(graph="ring", file=tmp_path)


def test_relays_go_along_shortest_ways(tmp_path: Path) -> None:
    # 0 - 1 - 2 - 3 - 4, from 1: to both sides, then on
    hops = path_graph(tmp_path, 5).journeys(0, 1, relayed=True)
    assert hops == {n: Hop(s, True, 0) for n, s in {0: 1, 2: 1, 3: 2, 4: 3}.items()}
    assert list(hops) == [0, 2, 3, 4]  # in the order of sending


def test_without_relays_only_neighbours_hear(tmp_path: Path) -> None:
    hops = path_graph(tmp_path, 5).journeys(0, 1, relayed=False)
    assert hops == {0: Hop(1, True, 0), 2: Hop(1, True, 0)}


def test_a_ring_is_gone_round_from_both_sides() -> None:
    # From 0 of 6: 1 and 5, then 2 (of 1) and 4 (of 5), then 3 of whoever comes first
    hops = network(6, graph="ring").journeys(0, 0, relayed=True)
    assert {n: hop.sender for n, hop in hops.items()} == {1: 0, 5: 0, 2: 1, 4: 5, 3: 2}


def test_everybody_hears_a_message_once_and_from_one_who_has_it() -> None:
    links = network(15, 3, graph="erdos_renyi", probability=0.25)
    for origin in range(15):
        hops, has = links.journeys(0, origin, relayed=True), {origin}
        assert hops.keys() == set(range(15)) - {origin}
        for receiver, hop in hops.items():
            assert hop.sender in has
            assert receiver in links.neighbours(hop.sender)
            has.add(receiver)


def test_a_lost_hop_cuts_off_what_lies_behind_it(tmp_path: Path) -> None:
    # On a path from its end: all hops up to the first loss, which was sent and did not arrive.
    chain, lengths = path_graph(tmp_path, 8, loss=0.4), set()
    for round in range(40):
        hops = chain.journeys(round, 0, relayed=True)
        assert list(hops) == list(range(1, len(hops) + 1))
        *others, last = hops.values()
        assert all(hop.arrived for hop in others)
        assert len(hops) == 7 or not last.arrived
        lengths.add(len(hops))
    assert {1, 2, 3} <= lengths


def test_messages_are_lost_as_often_as_asked() -> None:
    links = network(30, loss=0.3)
    hops = [hop for o in range(30) for hop in links.journeys(1, o, relayed=False).values()]
    assert len(hops) == 870
    lost = sum(not hop.arrived for hop in hops) / 870
    assert lost == pytest.approx(0.3, abs=0.06)  # 4 standard deviations


def test_loss_1_loses_everything_and_loss_0_nothing() -> None:
    assert not any(h.arrived for h in network(9, loss=1.0).journeys(0, 0, relayed=True).values())
    assert all(h.arrived for h in network(9, delay=0.5).journeys(0, 0, relayed=True).values())


def test_delays_are_geometric() -> None:
    # P(late >= k) = delay^k
    links = network(40, delay=0.5)
    late = [hop.late for o in range(40) for hop in links.journeys(2, o, relayed=False).values()]
    for k in (1, 2, 3):
        share = sum(each >= k for each in late) / len(late)
        assert share == pytest.approx(0.5**k, abs=0.05)


@pytest.mark.parametrize("kind", ["loss", "delay"])
def test_draws_follow_from_seed_round_and_origin(kind: str) -> None:
    def seen(seed: int, round: int, origin: int) -> list[Hop]:
        hops = network(40, seed, **{kind: 0.5}).journeys(round, origin, relayed=False)
        return [hops[n]._replace(sender=0) for n in range(2, 40)]

    first = seen(0, 0, 0)
    assert seen(0, 0, 0) == first
    for other in (seen(1, 0, 0), seen(0, 1, 0), seen(0, 0, 1)):
        assert other != first


def test_loss_and_delay_are_drawn_apart() -> None:
    # Were they one draw, what arrives would never be among the late, or always.
    hops = network(60, loss=0.5, delay=0.5).journeys(0, 0, relayed=False).values()
    assert {(h.arrived, h.late > 0) for h in hops} == {(a, b) for a in (0, 1) for b in (0, 1)}


def test_the_order_of_asking_changes_no_draw() -> None:
    one, other = network(6, loss=0.5, failure=0.3), network(6, loss=0.5, failure=0.3)
    keys = [(round, origin) for round in range(3) for origin in range(6)]
    seen = {key: one.journeys(*key, relayed=True) for key in keys}
    assert {key: other.journeys(*key, relayed=True) for key in reversed(keys)} == seen


def test_links_fail_for_a_round_in_both_directions() -> None:
    links, up = network(12, failure=0.4), []
    for round in range(20):
        graph = links.links(round)
        assert set(graph.nodes) == set(range(12))
        for origin in range(12):
            heard = links.journeys(round, origin, relayed=False)
            assert sorted(heard) == sorted(graph[origin])
        up.append(frozenset(map(frozenset, graph.edges)))
    assert len(set(up)) == 20
    share = sum(map(len, up)) / (20 * 66)
    assert share == pytest.approx(0.6, abs=0.06)  # 4 standard deviations
    assert links.links(3).edges == network(12, failure=0.4).links(3).edges
    assert links.links(3).edges != network(12, seed=1, failure=0.4).links(3).edges
    assert links.graph.number_of_edges() == 66  # the graph itself stays


def test_failure_1_separates_everybody() -> None:
    links = network(4, failure=1.0)
    assert links.journeys(0, 0, relayed=True) == {}
    assert links.mixing(0, 2) == {2: 1}


def test_what_is_reliable() -> None:
    assert network(3).reliable
    for kind in ("loss", "delay", "failure"):
        assert not network(3, **{kind: 0.1}).reliable


def test_equal_neighbourhoods_mix_equally() -> None:
    assert network(5, graph="ring").mixing(0, 0) == {0: 1, 1: 1, 4: 1}
    assert network(3).mixing(0, 1) == {0: 1, 1: 1, 2: 1}


def test_metropolis_weights_by_hand(tmp_path: Path) -> None:
    # 0 - 1 - 2: degrees 1 2 1, so 1 / (1 + 2) on both links and the rest for oneself.
    chain, third = path_graph(tmp_path, 3), 21845  # 2^16 / 3 = 21845.33
    assert chain.mixing(0, 0) == {0: 65536 - third, 1: third}
    assert chain.mixing(0, 1) == {1: 65536 - 2 * third, 0: third, 2: third}


@pytest.mark.parametrize("failure", [0.0, 0.3])
def test_the_mixing_matrix_is_symmetric_and_doubly_stochastic(failure: float) -> None:
    links = network(9, 1, graph="erdos_renyi", probability=0.4, failure=failure)
    assert len({len(links.neighbours(n)) for n in range(9)}) > 2
    for round in range(4):
        rows = [links.mixing(round, peer) for peer in range(9)]
        for peer, row in enumerate(rows):
            assert row.keys() == {peer, *links.links(round)[peer]}
            assert all(weight > 0 for weight in row.values())
            assert sum(row.values()) == 65536
            assert all(rows[other][peer] == weight for other, weight in row.items())


def test_nobody_hands_on_what_it_does_not_have_yet(tmp_path: Path) -> None:
    chain = path_graph(tmp_path, 6, delay=0.5)
    for round in range(20):
        hops = chain.journeys(round, 0, relayed=True)
        for hop in hops.values():
            assert hop.sender == 0 or hop.late >= hops[hop.sender].late


def test_the_hub_of_a_large_star_keeps_a_positive_weight(tmp_path: Path) -> None:
    lines = "\n".join(f"0 {peer}" for peer in range(1, 498))
    file = tmp_path / "hub.txt"
    file.write_text(lines)
    hub = Network(settings=NetworkSettings(graph="file", file=file), peers=498, seed=0)
    assert min(hub.mixing(0, 0).values()) > 0
