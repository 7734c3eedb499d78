"""Fleets from settings and from files, and what of them is refused."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tesserafl.core.errors import ConfigError
from tesserafl.engines.device import INSTANT, Chain, Device, Link, Placed
from tesserafl.engines.fleet import CLOUD, Edge, Fleet, FleetSettings, generated
from tesserafl.engines.fleet_file import fleet_of
from tesserafl.engines.profiles import LINKS, PROFILES

FIBRE = LINKS["fibre"]


def fleet(homes: list[str], *edges: tuple[str, str]) -> Fleet:
    devices = (Placed(device=Device(gflops=1.0), id=n, seed=0) for n in range(len(homes)))
    nodes = tuple(Edge(name=name, parent=parent, link=INSTANT) for name, parent in edges)
    return Fleet(devices=tuple(devices), edges=nodes, homes=tuple(homes))


def read(tmp_path: Path, text: str, clients: int) -> Fleet:
    path = tmp_path / "fleet.toml"
    path.write_text(text, encoding="utf-8")
    return fleet_of(FleetSettings(file=path), clients, seed=3)


# Trees.


def test_who_stands_below_whom() -> None:
    tree = fleet(
        ["b", CLOUD, "a", "a1", "b", "a1"], ("a", CLOUD), ("a1", "a"), ("b", CLOUD), ("empty", "b")
    )
    assert [edge.name for edge in tree.edges_of(CLOUD)] == ["a", "b"]
    assert [edge.name for edge in tree.edges_of("a")] == ["a1"]
    assert tree.clients_of("a") == [2]
    assert tree.below("a") == [2, 3, 5]
    assert tree.below("a1") == [3, 5]
    assert tree.below("empty") == []
    assert tree.below(CLOUD) == [0, 1, 2, 3, 4, 5]
    assert tree.edge("a1").parent == "a"


@pytest.mark.parametrize(
    ("homes", "edges", "message"),
    [
        (["a"], [("a", CLOUD), ("a", CLOUD)], "two nodes of the fleet are called 'a'; rename one"),
        ([CLOUD], [("cloud", CLOUD)], "two nodes of the fleet are called 'cloud'"),
        (["edge-l"], [("edge-1", CLOUD)], "device 0 reports to 'edge-l', .* did you mean 'edge-1'"),
        (["a"], [("a", "b")], "edge 'a' reports to 'b', which the fleet does not have; .*cloud"),
        (["a"], [("a", "a")], "edge 'a' reports to itself"),
        (["a"], [("a", "b"), ("b", "c"), ("c", "a")], "edge 'a' reports to itself, over 'b'"),
        (["a"], [("a", "b"), ("b", "b")], "edge 'b' reports to itself"),
    ],
)
def test_trees_that_cannot_be(homes: list[str], edges: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fleet(homes, *edges)


# From settings.


def test_classes_links_and_backhauls_are_dealt_in_turn() -> None:
    chosen = FleetSettings(
        profiles=("phone", "laptop", "raspberry-pi-4"),
        edges=3,
        backhauls=("fibre", "overseas"),
        load=(0.1, 0.6),
        load_minutes=2.0,
        online=0.75,
        online_minutes=30.0,
    )
    made = generated(chosen, 9, seed=5)
    kinds = [placed.device.profile for placed in made.devices]
    assert kinds == ["phone", "laptop", "raspberry-pi-4"] * 3
    assert [(placed.id, placed.seed) for placed in made.devices] == [(n, 5) for n in range(9)]
    assert made.homes == tuple(f"edge-{n // 3}" for n in range(9))  # all classes on every edge
    assert [edge.link for edge in made.edges] == [FIBRE, LINKS["overseas"], FIBRE]
    assert {edge.parent for edge in made.edges} == {CLOUD}
    device = made.devices[1].device
    assert (device.gflops, device.link) == (PROFILES["laptop"].gflops, PROFILES["laptop"].link)
    assert device.load == Chain(values=(0.1, 0.6), mean_seconds=(120.0, 120.0))
    # 3/4 of the time online, 30 minutes at a time: 10 minutes away.
    assert device.online == Chain(values=(1.0, 0.0), mean_seconds=(1800.0, 600.0))


def test_one_link_for_all() -> None:
    made = generated(FleetSettings(profiles=("phone", "laptop"), link="4g"), 4, seed=0)
    assert {placed.device.link for placed in made.devices} == {LINKS["4g"]}
    assert set(made.homes) == {CLOUD}


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 20))
@settings(max_examples=80, deadline=None)
def test_clustered_edges_have_one_class_as_far_as_it_goes(
    kinds: int, edges: int, more: int
) -> None:
    clients = edges + more
    names = tuple(list(PROFILES)[:kinds])
    for clustered in (True, False):
        chosen = FleetSettings(profiles=names, edges=edges, clustered=clustered)
        made = generated(chosen, clients, seed=0)
        sizes = [len(made.clients_of(f"edge-{n}")) for n in range(edges)]
        assert sum(sizes) == clients and max(sizes) - min(sizes) <= 1  # equal parts, nobody lost
        if clustered:
            # Along the edges a class comes once: it never comes again after another.
            order = [
                made.devices[c].device.profile
                for edge in made.edges
                for c in sorted(made.clients_of(edge.name), key=lambda c: (c % kinds, c))
            ]
            assert sum(a != b for a, b in itertools.pairwise(order)) < kinds


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"profiles": ("fone",)}, r"fleet\.profiles names 'fone'; did you mean 'phone'"),
        ({"profiles": ("phone",), "link": "wify"}, "names 'wify'; did you mean 'wifi'"),
        ({"profiles": ("phone",), "backhauls": ("fiber",)}, "'fiber'; did you mean 'fibre'"),
        ({"profiles": ("phone",), "backhauls": ()}, r"fleet\.backhauls needs at least one"),
        ({"profiles": ("phone",), "edges": -1}, r"fleet\.edges must be 0 or more; got -1"),
        ({"edges": 2}, r"settings of a fleet need devices: add fleet\.profiles"),
        ({"online": 0.5}, "settings of a fleet need devices"),
        ({"profiles": ("phone",), "load": (0.5, 1.0)}, r"in \[0, 1\); got \[0\.5, 1\.0\]"),
        ({"profiles": ("phone",), "load": (math.nan,)}, "got .nan"),
        ({"profiles": ("phone",), "load_minutes": 0.0}, r"positive number of minutes; got 0\.0"),
        ({"profiles": ("phone",), "online": 0.0}, r"in \(0, 1\]; got 0\.0"),
        ({"profiles": ("phone",), "online": 1.5}, r"in \(0, 1\]; got 1\.5"),
        ({"profiles": ("phone",), "online_minutes": -1.0}, r"minutes; got -1\.0"),
        ({"file": Path("f.toml"), "profiles": ("phone",)}, r"fleet\.file says all about a fleet"),
        ({"file": Path("f.toml"), "edges": 3}, "leave the other settings of fleet away"),
    ],
)
def test_settings_of_a_fleet_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FleetSettings(**given)


def test_more_edges_than_clients() -> None:
    with pytest.raises(ConfigError, match=r"fleet\.edges is 4, but there are only 3 clients"):
        generated(FleetSettings(profiles=("phone",), edges=4), 3, seed=0)


# From a file.

WHOLE = """
[[edges]]
name = "lab"
link = {up_mbps = 10.0, down_mbps = 20.0, latency_ms = 5.0}

[[edges]]
name = "room"
parent = "lab"

[[devices]]
profile = "phone"
count = 2
edge = "room"

[[devices]]
profile = "laptop"
gflops = 99.0
link = "4g"
busy_watts = 50.0
load = {levels = [0.0, 0.5], minutes = 1.0}
online = {share = 0.5}
joins_hours = 1.0
leaves_hours = 2.5

[[devices]]
gflops = 3.0
memory_mib = 512.0
edge = "lab"
"""


def test_a_file_with_everything(tmp_path: Path) -> None:
    made = read(tmp_path, WHOLE, clients=4)
    assert made.homes == ("room", "room", CLOUD, "lab")
    assert made.edges == (
        Edge(name="lab", link=Link(up_mbps=10.0, down_mbps=20.0, latency_ms=5.0)),
        Edge(name="room", parent="lab", link=FIBRE),
    )
    assert [(placed.id, placed.seed) for placed in made.devices] == [(n, 3) for n in range(4)]
    phone, other, laptop, own = (placed.device for placed in made.devices)
    assert phone == other == PROFILES["phone"]
    assert (laptop.profile, laptop.gflops, laptop.link) == ("laptop", 99.0, LINKS["4g"])
    assert (laptop.busy_watts, laptop.idle_watts) == (50.0, PROFILES["laptop"].idle_watts)
    assert laptop.load == Chain(values=(0.0, 0.5), mean_seconds=(60.0, 60.0))
    assert laptop.online == Chain(values=(1.0, 0.0), mean_seconds=(3600.0, 3600.0))
    assert (laptop.joins_seconds, laptop.leaves_seconds) == (3600.0, 9000.0)
    assert (own.profile, own.gflops, own.memory_mib, own.link) == ("custom", 3.0, 512.0, INSTANT)


DEVICE = '[[devices]]\nprofile = "phone"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{DEVICE}gflop = 3.0\n", r"devices\.0\.gflop: Extra inputs are not permitted"),
        (f"{DEVICE}link = {{up_mbps = 1.0}}\n", r"devices\.0\.link.*down_mbps: Field required"),
        (f"title = 'x'\n{DEVICE}", "title: Extra inputs"),
        ("", "devices: Field required"),
        (f"{DEVICE}count = 0\n", r"devices\.0\.count: .* greater than or equal to 1"),
        (f"{DEVICE}gflops = inf\n", r"devices\.0\.gflops: .* finite"),
        (f"{DEVICE}gflops = -1.0\n", r"devices\.0\.gflops: .* greater than 0"),
        (f"{DEVICE}count = 'two'\n", r"devices\.0\.count: .* integer"),
        (
            DEVICE + DEVICE.replace("phone", "fone"),
            "devices.profile names 'fone'; did you mean 'ph",
        ),
        (f"{DEVICE}link = 'wify'\n", "link names 'wify'; did you mean 'wifi'"),
        ("[[devices]]\nidle_watts = 1.0\n", "a device needs a profile, or gflops of its own"),
        (f"{DEVICE}idle_watts = -1.0\n", r"idle_watts must be 0 or more; got -1\.0"),
        (f"{DEVICE}load = {{levels = [1.5]}}\n", r"in \[0, 1\); got \[1\.5\]"),
        (f"{DEVICE}online = {{share = 2.0}}\n", r"in \(0, 1\]; got 2\.0"),
        (f"{DEVICE}joins_hours = 2.0\nleaves_hours = 1.0\n", "leaves after it joins; got .* 7200"),
        (f"{DEVICE}edge = 'lab'\n", "device 0 reports to 'lab', which the fleet does not have"),
        (f"[[edges]]\nname = 'a'\n[[edges]]\nname = 'a'\n{DEVICE}", "two nodes .* called 'a'"),
        (f"[[edges]]\nname = 'a'\nparent = 'a'\n{DEVICE}", "edge 'a' reports to itself"),
        (f"[[edges]]\nname = 'a'\nlink = 'string'\n{DEVICE}", "link names 'string'; allowed"),
        ("[[devices]\n", "is not valid TOML"),
        (
            f"{DEVICE}count = 3\n",
            r"has 3 devices, the run has 1 clients; set data\.num_clients to 3",
        ),
    ],
)
def test_files_that_cannot_be(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        read(tmp_path, text, clients=1)
    # Whatever is wrong in a file, the message names the file.
    assert "fleet.toml" in str(raised.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    chosen = FleetSettings(file=tmp_path / "none.toml")
    with pytest.raises(ConfigError, match=r"fleet .*none\.toml cannot be read: No such file"):
        fleet_of(chosen, 1, seed=0)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        fleet_of(FleetSettings(file=tmp_path), 1, seed=0)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        fleet_of(FleetSettings(file=path), 1, seed=0)
