"""Actors of a cluster, played in this process: what crosses, and what is told of what is wrong."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from tesserafl.core.errors import ConfigError, TesseraError
from tesserafl.core.messages import Memory, Task
from tesserafl.core.params import sha256
from tesserafl.engines import cluster
from tesserafl.engines.client import ClientWorker
from tesserafl.engines.cluster import Actors, Share
from tesserafl.engines.pool import Answered, Broke, Ended
from tesserafl.run.begin import first_federation
from tesserafl.run.experiment import from_json
from tesserafl.run.setup import Setup, client_worker, device_of, loaded, prepare, shared_by_all


class RayError(Exception): ...


class RayActorError(RayError): ...


class Fake(types.ModuleType):
    """As much of Ray as we call. An actor lives here; what it is asked is done at once."""

    def __init__(self, cpus: float = 8.0, gpus: float = 0.0) -> None:
        super().__init__("ray")
        names = ("ObjectLostError", "NodeDiedError", "OutOfMemoryError", "ObjectStoreFullError")
        kinds: dict[str, Any] = {name: type(name, (RayError,), {}) for name in names}
        self.exceptions = types.SimpleNamespace(
            RayError=RayError, RayActorError=RayActorError, **kinds
        )
        self.there = {"CPU": cpus, "GPU": gpus, "node:10.0.0.1": 1.0}
        self.begun: list[dict[str, Any]] = []
        self.is_up, self.killed, self.slow = False, 0, 0
        self.options: dict[str, Any] = {}
        self.crossed: list[object] = []

    def is_initialized(self) -> bool:
        return self.is_up

    def init(self, **settings: Any) -> None:
        if settings["address"] == "nowhere:1":
            raise ConnectionError("nobody there\nat all")
        self.begun.append(settings)
        self.is_up = True

    def shutdown(self) -> None:
        self.is_up = False

    def cluster_resources(self) -> Mapping[str, float]:
        return self.there

    available_resources = cluster_resources

    def remote(self, kind: type) -> Any:
        def options(**options: Any) -> Any:
            self.options = options
            return types.SimpleNamespace(remote=lambda *args: Handle(self, kind(*args)))

        return types.SimpleNamespace(options=options)

    def wait(
        self, references: Sequence[Any], num_returns: int, timeout: float | None = None
    ) -> tuple[list[Any], list[Any]]:
        assert 0 < num_returns <= len(references)
        ready = len(references) - self.slow
        return list(references[:ready]), list(references[ready:])

    def get(self, reference: Any) -> Any:
        if isinstance(reference, list):
            return [self.get(each) for each in reference]
        if isinstance(reference.value, Exception):
            raise reference.value
        assert type(reference.value) is bytes
        return reference.value

    def kill(self, handle: Handle) -> None:
        handle.is_alive = False
        self.killed += 1


class Reference:
    def __init__(self, value: object) -> None:
        self.value = value


class Handle:
    def __init__(self, ray: Fake, actor: Any) -> None:
        self.ray, self.actor, self.is_alive = ray, actor, True

    @property
    def greet(self) -> Any:
        return types.SimpleNamespace(remote=lambda: Reference(self.actor.greet()))

    @property
    def work(self) -> Any:
        def options(num_returns: int) -> Any:
            def remote(*messages: bytes) -> list[Reference]:
                assert num_returns == 1 + len(messages)
                if not self.is_alive:
                    error = RayActorError("The actor died.\n\tpid: 7")
                    return [Reference(error) for _ in range(num_returns)]
                self.ray.crossed += messages
                return [Reference(value) for value in self.actor.work(*messages)]

            return types.SimpleNamespace(remote=remote)

        return types.SimpleNamespace(options=options)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake()
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "")  # so that it is put back
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED")
    return fake


@pytest.fixture(scope="module")
def setup() -> Setup:
    settings = {
        "data": {"num_clients": 4, "max_train": 100, "max_test": 20},
        "model": {"name": "mlp", "hidden": [8]},
        "method": {"name": "msfusion", "ratio": [0.5], "momentum": "carry"},
        "training": {"momentum": 0.5},
        "clients_per_round": 3,
        "engine": {"batching": "sequential"},
    }
    return prepare(from_json(settings))


def actors(setup: Setup, address: str = "local", size: int = 2, **changes: Any) -> Actors:
    given: dict[str, Any] = {
        "load": lambda hello: (client_worker(setup), shared_by_all(setup)),
        "share": Share(threads=1, gpus=0.0),
        "shared": shared_by_all(setup),
        **changes,
    }
    return Actors(address, hello=b"{}", size=size, **given)


def asked_of(setup: Setup) -> list[tuple[Task, Memory]]:
    tasks = first_federation(setup).tasks(setup.cohort(0), setup.experiment.training)
    return [(task, {}) for task in tasks]


def test_only_bytes_cross_and_answers_are_those_of_a_worker_here(ray, setup) -> None:
    workers, asked = actors(setup), asked_of(setup)
    workers.send(1, asked)
    assert workers.ready() == [1]
    found = workers.receive(1, [task for task, _ in asked])
    assert isinstance(found, Answered) and found.seconds > 0
    assert len(ray.crossed) == 3 and all(type(each) is bytes for each in ray.crossed)
    wanted = client_worker(setup).work_together(asked)
    for answer, own in zip(found.answers, wanted, strict=True):
        assert not isinstance(answer, str) and not isinstance(own, TesseraError)
        assert sha256(answer[0].delta) == sha256(own[0].delta)
        assert sha256(answer[1]) == sha256(own[1]) and answer[1]


def test_failures_of_a_client_of_our_code_and_of_an_actor_are_told_apart(ray, setup) -> None:
    workers, ((task, memory), other, _) = actors(setup), asked_of(setup)
    cannot = replace(task, training=replace(task.training, momentum=0.0))
    workers.send(0, [(cannot, memory), other])
    found = workers.receive(0, [cannot, other[0]])
    assert isinstance(found, Answered) and "momentum" in str(found.answers[0])
    assert not isinstance(found.answers[1], str)
    fault = replace(task, params={name: tensor[None] for name, tensor in task.params.items()})
    workers.send(0, [(fault, memory)])
    found = workers.receive(0, [fault])
    assert isinstance(found, Broke) and "Traceback" in found.text
    workers.actors[0].is_alive = False
    workers.send(0, [other])
    found = workers.receive(0, [other[0]])
    assert found == Ended(how="the actor ended (The actor died. pid: 7)")
    workers.replace(0)
    workers.send(0, [other])
    assert isinstance(workers.receive(0, [other[0]]), Answered)


def test_an_instance_of_our_own_is_quiet_fits_and_ends_with_the_engine(ray, setup) -> None:
    workers = actors(setup, share=Share(threads=3, gpus=0.0))
    (begun,) = ray.begun
    assert begun["address"] == "local" and begun["num_cpus"] == 6
    assert begun["include_dashboard"] is False
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert (ray.options["num_cpus"], ray.options["max_restarts"]) == (3, 0)
    workers.close()
    workers.close()
    assert ray.killed == 2 and not ray.is_up and workers.size == 0


def test_an_instance_of_the_caller_stays(ray, setup) -> None:
    ray.is_up = True
    actors(setup).close()
    assert ray.begun == [] and ray.is_up and ray.killed == 2


def test_a_cluster_is_joined_as_it_is(ray, setup) -> None:
    actors(setup, "10.0.0.1:6379").close()
    (begun,) = ray.begun
    assert begun["address"] == "10.0.0.1:6379" and "num_cpus" not in begun


def test_nobody_at_the_address(ray, setup) -> None:
    with pytest.raises(ConfigError, match=r"nowhere:1'.*nobody there at all.*ray status"):
        actors(setup, "nowhere:1")


@pytest.mark.parametrize(
    ("size", "gpus", "needs"), [(9, 0.0, "9 CPUs and 0 GPUs"), (2, 0.5, "2 CPUs and 1 GPUs")]
)
def test_a_cluster_that_is_too_small_is_refused_and_let_go(ray, setup, size, gpus, needs) -> None:
    with pytest.raises(ConfigError, match=rf"need {needs}; the cluster has 8 CPUs and 0 GPUs"):
        actors(setup, "auto", size, share=Share(threads=1, gpus=gpus))
    assert not ray.is_up


def test_actors_that_are_never_placed_are_an_error(ray, setup) -> None:
    ray.slow = 1
    with pytest.raises(TesseraError, match=r"1 of 2 actors were not ready.*free are now 8 CPUs"):
        actors(setup)
    assert ray.killed == 2 and not ray.is_up


def test_an_actor_that_cannot_load_says_why(ray, setup) -> None:
    def load(hello: bytes) -> tuple[ClientWorker, Mapping[str, str]]:
        raise ConfigError("/data is not a folder")

    with pytest.raises(TesseraError, match="could not load the experiment: /data is not a folder"):
        actors(setup, load=load)


def test_a_machine_with_other_versions_or_data_is_refused(ray, setup) -> None:
    there = {**shared_by_all(setup), "the version of torch": "1.0"}
    with pytest.raises(TesseraError, match=r"torch is '1.0' where an actor runs and '\d"):
        actors(setup, load=lambda hello: (client_worker(setup), there))


def test_other_data_have_another_digest(setup) -> None:
    fewer = tuple(replace(client, num_examples=1) for client in setup.clients)
    assert shared_by_all(setup) == shared_by_all(replace(setup))
    assert shared_by_all(setup) != shared_by_all(replace(setup, clients=fewer))


def test_an_actor_trains_with_its_own_threads_and_leaves_no_trace(setup) -> None:
    seen: list[int] = []

    def load(hello: bytes) -> tuple[ClientWorker, Mapping[str, str]]:
        seen.append(torch.get_num_threads())
        return client_worker(setup), {}

    before = torch.get_num_threads()
    assert cluster.Actor(load, b"{}", before + 1).greet() == b"{}"
    assert seen == [before + 1] and torch.get_num_threads() == before


def test_an_experiment_that_crosses_is_loaded_as_it_is_here(ray, setup, monkeypatch) -> None:
    """By the function that real actors begin with."""
    from tesserafl.run.setup import make_engine

    engine = replace(setup.experiment.engine, kind="ray", workers=5)
    setup = replace(setup, experiment=replace(setup.experiment, engine=engine))
    pool = make_engine(setup)
    assert pool.capacity == 3  # no more than clients of a round
    hello = pool.workers._begin[1]
    worker, shared = loaded(hello)
    assert shared == shared_by_all(setup) and worker.device == "cpu"
    pool.close()


WRONG = [
    ({"gpus": 0.5}, "are of engine.kind 'ray'"),
    ({"address": "10.0.0.1:6379"}, "are of engine.kind 'ray'"),
    ({"kind": "ray", "gpus": 2}, r"must be in \[0, 1\]"),
    ({"kind": "ray", "gpus": float("nan")}, r"must be in \[0, 1\]"),
    ({"kind": "ray", "device": "cuda"}, "contradicts engine.gpus 0"),
    ({"kind": "ray", "device": "cpu", "gpus": 0.5}, "contradicts engine.gpus 0.5"),
    ({"kind": "ray", "address": "ray://host:10001"}, "HOST:PORT"),
    ({"kind": "ray", "address": ""}, "HOST:PORT"),
    ({"kind": "flower"}, "'local' or 'ray'"),
]


@pytest.mark.parametrize(("engine", "message"), WRONG)
def test_settings_that_contradict_each_other_are_refused(engine, message) -> None:
    with pytest.raises(ConfigError, match=message):
        from_json({"engine": engine})


def test_a_cluster_may_have_the_gpus_that_this_machine_lacks(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of(from_json({"engine": {"kind": "ray", "gpus": 1, "device": "cuda"}})) == "cpu"
    with pytest.raises(ConfigError, match="finds no GPU"):
        device_of(from_json({"engine": {"device": "cuda"}}))
