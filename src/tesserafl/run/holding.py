"""What a device, or an edge, holds of a run: the experiment, its data, and what trains on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from tesserafl.core.errors import ConfigError, DataError, MessageError
from tesserafl.core.messages import Client
from tesserafl.data import ClientData, Examples, FederatedData, Spec, load_own
from tesserafl.engines.client import ClientWorker
from tesserafl.engines.kept import Kept
from tesserafl.models import FeatureAdapter, HuggingFace, LoRA, Prompts
from tesserafl.run.experiment import Experiment, from_json
from tesserafl.run.setup import Setup, client_worker, prepare

_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Local:
    """What a device's owner says of it; nothing of it is the server's to choose."""

    data: Path | None = None
    """folder with its data; None: what the experiment names, and must be on the device too"""
    client: int | None = None
    """the client whose part of the experiment's data it takes; None: all of `data` is its own"""
    model: Path | None = None
    """folder with the pre-trained model that the experiment names; None: the experiment's path"""
    tokenizer: Path | None = None
    """folder with the tokenizer; None: the experiment's path"""
    device: str = "auto"
    """cpu, cuda or auto"""


@dataclass(frozen=True, kw_only=True)
class Holding:
    """What answers tasks of one run."""

    experiment: Experiment
    data: ClientData
    setup: Setup
    worker: ClientWorker


def hold(local: Local, values: Mapping[str, Any], spec_values: Mapping[str, Any]) -> Holding:
    """Load the device's data and build what trains on it; values are those of a Hello.

    Raises:
        TesseraError: they are no experiment, or the device lacks what it needs.
    """
    experiment = here(from_json(values), local)
    spec = _spec_of(spec_values)
    if local.client is not None:
        setup = prepare(experiment)
        if setup.data.spec != spec:
            raise DataError(
                "the data here is not the server's: its inputs or classes differ; give the same "
                "data with --data"
            )
        if local.client >= len(setup.clients):
            raise ConfigError(
                f"client {local.client} does not exist: the experiment has {len(setup.clients)}"
            )
        data = setup.data.clients[local.client]
    else:
        if local.data is None:
            raise ConfigError(
                "which data? Give a folder with --data, or a part of the experiment's own data "
                "with --client"
            )
        # Split as if it were client 0: a device keeps its split, whatever seat it takes.
        data = load_own(experiment.data, experiment.seed, 0, spec)
        setup = Setup(
            experiment=experiment,
            data=FederatedData(spec=spec, clients=(data,), test=data.test),
            model=experiment.model.build_model(spec),
            clients=(Client(id=0, num_examples=len(data.train)),),
            kept=Kept(most_bytes=experiment.engine.cache_mib * _MIB),
        )
    worker = replace(
        client_worker(setup), examples=lambda _: data.train, validation=lambda _: data.validation
    )
    return Holding(experiment=experiment, data=data, setup=setup, worker=worker)


def setup_without_data(
    local: Local, values: Mapping[str, Any], spec_values: Mapping[str, Any]
) -> Setup:
    """An experiment's model and method, for who has none of its data; values are a Hello's.

    Raises:
        TesseraError: it is no experiment, or its model is not on this machine.
    """
    experiment, spec = here(from_json(values), local, data=False), _spec_of(spec_values)
    # Of examples the shape alone is needed, to count costs with.
    types: dict[str, Any] = {"image": torch.uint8, "vector": torch.float32, "tokens": torch.int32}
    inputs = torch.zeros(1, *spec.shape, dtype=types[spec.kind])
    places = spec.shape if spec.task == "causal-lm" else ()
    one = Examples(inputs=inputs, labels=torch.zeros(1, *places, dtype=torch.int64))
    none = one.take(torch.zeros(0, dtype=torch.int64))
    shape = ClientData(train=one, validation=none, test=none)
    data = FederatedData(spec=spec, clients=(shape,), test=none, elsewhere=True)
    model = experiment.model.build_model(spec)
    return Setup(experiment=experiment, data=data, model=model, clients=())


def _spec_of(values: Mapping[str, Any]) -> Spec:
    try:
        spec: Spec = TypeAdapter(Spec).validate_python(values)
    except ValidationError as error:
        raise MessageError(f"what a model must know of the data is wrong: {error}") from error
    return spec


def here(experiment: Experiment, local: Local, data: bool = True) -> Experiment:
    """The experiment, with the paths of this device; `data` says whether it must have data."""
    changes: dict[str, Any] = {}
    if local.data is not None:
        changes["path"] = local.data.absolute()
    if local.tokenizer is not None:
        changes["tokenizer"] = local.tokenizer.absolute()
    engine = replace(
        experiment.engine, workers=1, batching="sequential", device=_device(local.device)
    )
    experiment = replace(experiment, data=replace(experiment.data, **changes), engine=engine)
    if local.model is not None:
        found = experiment.model
        if not isinstance(found, HuggingFace | LoRA | Prompts | FeatureAdapter):
            raise ConfigError("--model is for experiments with a pre-trained model; leave it away")
        experiment = replace(experiment, model=replace(found, config=str(local.model.absolute())))
    for what, path in {
        "--data": experiment.data.path,
        "--tokenizer": experiment.data.tokenizer,
    }.items():
        if data and path is not None and not path.exists():
            raise DataError(
                f"the experiment's {path} is not on this device; name its place here with {what}"
            )
    return experiment


def _device(name: str) -> Any:
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"a device is auto, cpu or cuda; got {name!r}")
    return name
