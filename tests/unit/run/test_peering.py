"""What `tessera plan` says about peers, against what the papers' formulas and the links say."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
from rich.console import Console

from tesserafl.run.experiment import from_json
from tesserafl.run.peering import Peering
from tesserafl.run.plan import described, make_plan
from tesserafl.run.setup import prepare


def peering_of(**changes: Any) -> Peering:
    plan = make_plan(prepare(from_json(settings(**changes))), (1,))
    assert plan.peering is not None
    return plan.peering


def settings(**changes: Any) -> dict[str, Any]:
    # Widths of 64 x 1/4 = 16 units; gaps of 8 at overlap 1/2: nothing is rounded.
    return {
        "data": {"num_clients": 5, "max_train": 200, "max_test": 50},
        "model": {"name": "mlp", "hidden": [64, 64]},
        "method": {"name": "msfusion", "ratio": [0.25], "overlap_schedule": "constant"},
        "clients_per_round": 5,
        "rounds": 9,
        **changes,
    }


# Of a part of width 16: 64 x 16 + 16, 16 x 16 + 16, 16 x 10 + 10.
PART = (64 * 16 + 16) + (16 * 16 + 16) + (16 * 10 + 10)
WHOLE = (64 * 64 + 64) + (64 * 64 + 64) + (64 * 10 + 10)


def test_the_counted_union_is_the_formula() -> None:
    # 1/4 x (1 + 4 x 1/2) = 3/4, in every round.
    peering = peering_of()
    assert [union.round for union in peering.unions] == [0, 2, 4, 6, 8]
    for union in peering.unions:
        assert (union.overlap, union.analytic, union.counted) == (0.5, 0.75, 0.75)


def test_the_formula_is_not_for_staggered_layers() -> None:
    method = {"name": "msfusion", "ratio": [0.25], "layer_phase": "staggered"}
    assert {union.analytic for union in peering_of(method=method).unions} == {None}


@pytest.mark.parametrize(
    ("network", "sent"),
    [
        ({}, [4, 4]),  # to all others
        ({"graph": "ring"}, [4, 4]),  # 4 copies of every message over a ring of 5
        ({"exchange": "gossip", "graph": "ring"}, [2, 2]),
        ({"graph": "file"}, [4, 16]),  # a star around peer 0, which hands on 4 x 3 messages
    ],
    ids=["complete", "ring", "gossip", "hub"],
)
def test_bytes_are_those_of_the_links(
    network: dict[str, Any], sent: list[int], tmp_path: Any
) -> None:
    if network.get("graph") == "file":
        (tmp_path / "hub.txt").write_text("0 1\n0 2\n0 3\n0 4\n")
        network = {**network, "file": str(tmp_path / "hub.txt")}
    peering = peering_of(network=network)
    mean, most = peering.bytes_sent
    assert mean == pytest.approx(4 * PART * (sent[0] if len({*sent}) == 1 else 20 / 5))
    assert most == 4 * PART * sent[1]
    assert peering.stored == WHOLE


def test_lean_peers_store_and_send_less() -> None:
    whole, lean = peering_of(), peering_of(network={"exchange": "lean"})
    assert lean.stored is not None and PART <= lean.stored < WHOLE / 2
    assert lean.bytes_sent[0] < whole.bytes_sent[0] / 2


def test_more_participants_each_do_less() -> None:
    shares = peering_of().shares
    assert [share.participants for share in shares] == [2, 5, 10, 20, 50, 100]
    # mu = 1 / (1 + (N - 1) / 2)
    assert [share.ratio for share in shares[:2]] == pytest.approx([2 / 3, 1 / 3])
    flops = [share.flops_per_example for share in shares]
    assert flops == sorted(flops, reverse=True) and flops[-1] < flops[0] / 20


def test_it_is_shown_and_is_plain() -> None:
    plan = make_plan(prepare(from_json(settings())), (1,))
    console = Console(width=120, record=True)
    for part in described(plan):
        console.print(part)
    text = console.export_text()
    assert "exchange all_gather" in text and "75.0%" in text and "participants" in text
    assert asdict(plan)["peering"]["graph"] == "complete"


def test_a_star_has_no_peers() -> None:
    method = {"name": "fedrolex", "ratio": [0.25]}
    assert make_plan(prepare(from_json(settings(method=method))), (1,)).peering is None
    over = peering_of(method=method, network={"topology": "peers"})
    assert {union.overlap for union in over.unions} == {None} and not over.shares


def test_the_peak_counts_frozen_sub_models() -> None:
    def peak(**method: Any) -> int:
        given = {"name": "msfusion", "ratio": [0.25], **method}
        (kind,) = make_plan(prepare(from_json(settings(method=given))), (1,)).classes
        return kind.peak_bytes

    plain, part = peak(contrast=0.0), 4 * PART
    assert peak() == plain + 2 * part  # the part as received, the own last one
    assert peak(negatives="peers") == plain + 3 * part  # the part as received, two peers'
    assert peak(negatives="both", peer_negatives=1) == plain + 3 * part
