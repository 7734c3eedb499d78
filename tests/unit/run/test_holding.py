"""What a device takes from its disk for a run, and what it refuses."""

from __future__ import annotations

from dataclasses import asdict, replace

import pyarrow as pa
import pytest
from devices_at_hand import prepare_once
from own_data import write
from pyarrow import parquet

from tesserafl.core.errors import ConfigError, DataError, MessageError, TesseraError
from tesserafl.data import DataSettings
from tesserafl.methods import FedAvg
from tesserafl.models import MLP
from tesserafl.run.experiment import EngineSettings, Experiment, to_json
from tesserafl.run.holding import Local, hold
from tesserafl.run.setup import prepare

CLASSES = ["ant", "bee", "cat"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The server's data and what a Hello says of its run."""
    folder = write(tmp_path_factory.mktemp("server") / "data", CLASSES * 8)
    experiment = Experiment(
        data=DataSettings(path=folder, num_clients=2, partition="iid"),
        model=MLP(hidden=(8,)),
        method=FedAvg(),
        engine=EngineSettings(batching="sequential", workers=1),
        clients_per_round=2,
        rounds=1,
    )
    return experiment, asdict(prepare(experiment).data.spec)


def held(server, **local):
    experiment, spec = server
    return hold(Local(device="cpu", **local), to_json(experiment), spec)


def test_a_part_is_the_one_of_the_server(server):
    setup = prepare(server[0])
    for client in (0, 1):
        found = held(server, client=client)
        mine, theirs = found.data.train, setup.data.clients[client].train
        assert mine.labels.tolist() == theirs.labels.tolist()
        assert mine.inputs.equal(theirs.inputs)
    with pytest.raises(ConfigError, match="client 2 does not exist: the experiment has 2"):
        held(server, client=2)


def test_a_folder_of_ones_own_is_one_client_with_the_servers_classes(server, tmp_path):
    own = write(tmp_path / "own", ["cat", "bee", "cat", "cat", "bee"])
    found = held(server, data=own)
    assert sorted(found.data.train.labels.tolist()) == [1, 1, 2, 2, 2]
    assert found.setup.clients[0].num_examples == 5
    assert found.experiment.data.path == own
    # Whatever client the server makes of it, these are the examples.
    assert found.worker.examples(7) is found.data.train


@pytest.mark.parametrize(
    ("labels", "other", "text"),
    [
        (["ant", "dog"], {}, "'dog', a class that the training part"),
        (["ant", "bee"], {"shape": (5, 6)}, r"are \(1, 5, 6\), the federation's are \(1, 6, 6\)"),
        (["ant", "bee"], {"column": "text"}, "data for"),
        ([], {}, "empty|no rows|nothing"),
    ],
    ids=["an unknown class", "other shapes", "another column", "nothing"],
)
def test_data_that_is_not_the_federations_is_refused(server, tmp_path, labels, other, text):
    if other.get("column") == "text":
        rows = {"text": ["a b", "c d"], "label": labels}
        (tmp_path / "own").mkdir()
        parquet.write_table(pa.table(rows), tmp_path / "own/train.parquet")
    else:
        write(tmp_path / "own", labels, **other)
    with pytest.raises(DataError, match=text):
        held(server, data=tmp_path / "own")


def test_what_is_not_on_this_device_is_named_with_the_way_out(server, tmp_path):
    with pytest.raises(DataError, match="name its place here with --data"):
        held(server, data=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="which data"):
        held(server)
    experiment, spec = server
    data = replace(experiment.data, tokenizer=tmp_path / "nowhere")
    with pytest.raises(DataError, match="with --tokenizer"):
        hold(Local(client=0), to_json(replace(experiment, data=data)), spec)
    with pytest.raises(ConfigError, match="--model is for experiments with a pre-trained"):
        held(server, client=0, model=tmp_path)
    with pytest.raises(ConfigError, match="auto, cpu or cuda; got 'tpu'"):
        hold(Local(client=0, device="tpu"), to_json(experiment), spec)


def test_another_data_set_than_the_servers_is_refused(server, tmp_path):
    """The experiment's part, but of a folder that holds something else."""
    other = write(tmp_path / "other", ["ant", "bee"] * 8)
    with pytest.raises(DataError, match="the data here is not the server's"):
        held(server, client=0, data=other)


def test_what_is_no_experiment_is_refused(server):
    experiment, spec = server
    for values in ({}, {"method": 3}, {**to_json(experiment), "more": 1}):
        if values:
            with pytest.raises(TesseraError):
                hold(Local(client=0), values, spec)
    with pytest.raises(MessageError, match="what a model must know of the data is wrong"):
        hold(Local(client=0), to_json(experiment), {"inputs": "?"})


def test_a_device_trains_alone_on_what_it_was_told(server, monkeypatch):
    prepare_once(monkeypatch)
    experiment, spec = server
    many = replace(experiment, engine=EngineSettings(workers=4, batching="vmapped"))
    found = hold(Local(client=0, device="cpu"), to_json(many), spec)
    assert found.experiment.engine.workers == 1 and found.worker.group == 1
    assert found.experiment.engine.device == "cpu"
