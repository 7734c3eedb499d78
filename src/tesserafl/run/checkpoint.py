"""Checkpoints: a safetensors file with JSON beside it, which is the commit.

    checkpoints/round-000020.safetensors    parameters, coverage counts, clients' memories
    checkpoints/round-000020.json           everything else, and the digest of the tensors

The JSON is written last, so a checkpoint without it never happened. The newest two are kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tesserafl.core.errors import CheckpointError, MessageError
from tesserafl.core.messages import Memory
from tesserafl.core.method import State
from tesserafl.core.params import Params
from tesserafl.core.wire import pack, unpack
from tesserafl.run.files import read_json, write_atomic, write_json

_KEPT = 2


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """All that a run needs to go on with the same bits."""

    states: Sequence[State]
    """The server's, or the different ones of the peers."""
    coverage: Params
    """Times that each entry was trained."""
    memories: Mapping[int, Memory]
    totals: Mapping[str, float]
    """Bytes, FLOPs and seconds so far."""
    events_bytes: int
    """Length of events.jsonl at this moment; what follows is of a lost future."""
    federation: Mapping[str, Any] = field(default_factory=dict)
    """What else the federation keeps: plain JSON values"""
    tensors: Mapping[str, Params] = field(default_factory=dict)
    """and groups of tensors."""


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint of the rounds that are done; older ones but one are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    groups: dict[str, Params] = {"coverage": checkpoint.coverage}
    for number, state in enumerate(checkpoint.states):
        groups |= {f"params-{number}": state.params, f"extra-{number}": state.extra}
    groups |= {f"memory-{client}": memory for client, memory in checkpoint.memories.items()}
    groups |= {f"federation-{name}": tensors for name, tensors in checkpoint.tensors.items()}
    data = pack({}, groups)
    path = folder / f"round-{checkpoint.states[0].round:06d}.safetensors"
    write_atomic(path, data)
    header = {
        "states": [
            {
                "round": state.round,
                "seed": state.seed,
                "rounds": state.rounds,
                "notes": dict(state.notes),
            }
            for state in checkpoint.states
        ],
        "federation": dict(checkpoint.federation),
        "totals": dict(checkpoint.totals),
        "events_bytes": checkpoint.events_bytes,
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
    }
    write_json(path.with_suffix(".json"), header)
    for old in sorted(folder.glob("round-*.json"))[:-_KEPT]:
        old.unlink()
    committed = {path.stem for path in folder.glob("round-*.json")}
    for tensors in folder.glob("round-*.safetensors"):
        if tensors.stem not in committed:
            tensors.unlink()


def latest(folder: Path) -> Checkpoint | None:
    """The newest committed checkpoint; None if there is none yet.

    Raises:
        CheckpointError: it is damaged. Older ones are left for the user to choose.
    """
    headers = sorted(folder.glob("round-*.json"))
    if not headers:
        return None
    path = headers[-1].with_suffix(".safetensors")
    way_out = (
        f"Remove {headers[-1].name} and {path.name} to go on from "
        + (headers[-2].stem if len(headers) > 1 else "the beginning")
        + "; the result is the same"
    )
    header: dict[str, Any] = read_json(headers[-1])
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != header["tensors_sha256"]:
            raise CheckpointError(f"checkpoint {path} does not match its digest. {way_out}")
        _, groups = unpack(data)
        return Checkpoint(
            states=[
                State(params=groups[f"params-{n}"], extra=groups[f"extra-{n}"], **values)
                for n, values in enumerate(header["states"])
            ],
            coverage=groups["coverage"],
            memories={int(client): m for client, m in _under("memory-", groups).items()},
            totals=header["totals"],
            events_bytes=header["events_bytes"],
            federation=header["federation"],
            tensors=_under("federation-", groups),
        )
    except (OSError, KeyError, TypeError, MessageError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}. {way_out}") from error


def _under(begin: str, groups: Mapping[str, Params]) -> dict[str, Params]:
    return {name.removeprefix(begin): g for name, g in groups.items() if name.startswith(begin)}
