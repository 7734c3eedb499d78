"""A model in parts: what each peer of a lean run keeps at its end, and all of them together.

part.safetensors   the values that the peer keeps, and which entries of the model they are
part.json          the experiment, what a model must know of the data, the peer and its round
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from tesserafl.core.errors import CheckpointError, ConfigError, MessageError
from tesserafl.core.layout import Bools
from tesserafl.core.method import State
from tesserafl.core.params import sha256
from tesserafl.core.wire import pack, unpack
from tesserafl.data import FederatedData, Spec
from tesserafl.data.examples import Examples
from tesserafl.engines.lean_peer import LeanPeer
from tesserafl.engines.strips import packed
from tesserafl.run.experiment import from_json, to_json
from tesserafl.run.export import export_model
from tesserafl.run.files import read_json, write_atomic, write_json
from tesserafl.run.setup import Setup

_TENSORS, _VALUES = "part.safetensors", "part.json"


@dataclass(frozen=True, kw_only=True)
class _About:
    """What part.json holds."""

    experiment: dict[str, Any]
    spec: Spec
    peer: int
    peers: int
    round: int


def write_part(folder: Path, setup: Setup, peer: LeanPeer) -> None:
    """Write what a peer keeps of the model."""
    folder.mkdir(parents=True, exist_ok=True)
    shares = peer.shares
    keeps = torch.from_numpy(packed(shares.masks(peer.client)))
    write_atomic(folder / _TENSORS, pack({}, {"part": {"values": peer.store, "keeps": keeps}}))
    about = _About(
        experiment=to_json(setup.experiment),
        spec=setup.data.spec,
        peer=peer.client,
        peers=shares.peers,
        round=peer.round,
    )
    write_json(folder / _VALUES, asdict(about))


def assemble(parts: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Put the parts of a run's peers together, and write the model as a run does.

    Returns what it is: rounds, entries, digest of its parameters. Who does this holds the whole.

    Raises:
        CheckpointError: a part is damaged or of another run, or entries are in none of them.
    """
    if not parts:
        raise ConfigError("which parts? Give the folders that peers wrote at the end of the run")
    found = {part: _about(part) for part in parts if _has_part(part)}
    absent = [part for part in parts if part not in found]
    if absent:
        raise CheckpointError(_without_part(absent[0], list(found.values())))
    first = found[parts[0]]
    for part, about in found.items():
        if replace(about, peer=first.peer, experiment=first.experiment) != first:
            raise CheckpointError(
                f"{part} is of round {about.round} of {about.peers} peers, {parts[0]} of round "
                f"{first.round} of {first.peers}; give the parts of one run"
            )
    experiment = from_json(first.experiment)
    model = experiment.model.build_model(first.spec)
    sizes = {name: int(np.prod(shape)) for name, shape in model.shapes.items()}
    flat, there = torch.zeros(sum(sizes.values())), np.zeros(sum(sizes.values()), dtype=bool)
    for part, about in found.items():
        keeps, values = _values(part, about.peer, len(there))
        flat[torch.from_numpy(keeps)] = values
        there |= keeps
    if lacking := int((~there).sum()):
        raise CheckpointError(
            f"{lacking} of {len(there)} entries are in none of the parts; "
            f"{_missing(list(found.values()))}"
        )
    pieces = torch.split(flat, list(sizes.values()))
    params = {
        name: piece.reshape(model.shapes[name]) for name, piece in zip(sizes, pieces, strict=True)
    }
    rounds = experiment.rounds
    state = State(params=params, seed=experiment.seed, rounds=rounds, round=first.round)
    predictor = experiment.method.predictor(model, state)
    export_model(predictor, folder, _no_data(first.spec))
    return {"rounds": first.round, "entries": len(there), "state_sha256": sha256(params)}


def _has_part(folder: Path) -> bool:
    return (folder / _VALUES).exists()


def _without_part(folder: Path, found: Sequence[_About]) -> str:
    """What to say of a folder without a part, beside those that have one."""
    text = f"{folder} holds no part of a peer: there is no {folder / _VALUES}"
    if (folder / "model.safetensors").exists():
        text = f"{folder} holds the whole model: only peers of network.exchange 'lean' have parts"
    return f"{text}; {_missing(found)}" if found else text


def _missing(found: Sequence[_About]) -> str:
    """Whose parts are not among these, and where they are."""
    here, peers = sorted({about.peer for about in found}), found[0].peers
    lacking = sorted(set(range(peers)) - set(here))
    if not lacking:
        return f"the parts of all {peers} peers are here without it: leave it away"
    return (
        f"here are the parts of peers {_listed(here)}; the parts of peers {_listed(lacking)} "
        f"of {peers} are missing. A peer writes its part at the end of the run, to model-... in "
        f"the folder where it keeps what it must (tessera join --folder): copy those folders here "
        f"and name them too"
    )


def _listed(peers: Sequence[int]) -> str:
    return ", ".join(map(str, peers))


def _about(folder: Path) -> _About:
    try:
        return TypeAdapter(_About).validate_python(read_json(folder / _VALUES))
    except ValidationError as error:
        raise CheckpointError(f"{folder / _VALUES} is damaged: {error}") from error


def _values(folder: Path, peer: int, total: int) -> tuple[Bools, Tensor]:
    """Which entries a peer's part holds, bool [total], and their values."""
    path = folder / _TENSORS
    try:
        part = unpack(path.read_bytes())[1]["part"]
        keeps = np.unpackbits(part["keeps"].numpy(), count=total).astype(bool)
        values = part["values"]
    except (OSError, MessageError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"the part of peer {peer} cannot be read: {path}: {error}; copy it again from the peer"
        ) from error
    if values.shape != (int(keeps.sum()),):
        raise CheckpointError(
            f"{path} has values of shape {list(values.shape)} for {int(keeps.sum())} entries"
        )
    return keeps, values


def _no_data(spec: Spec) -> FederatedData:
    nothing = Examples(inputs=torch.zeros(0), labels=torch.zeros(0))
    return FederatedData(spec=spec, clients=(), test=nothing)
