"""Laws that every engine keeps. A new engine joins by one line in KINDS.

Who trains, where, in which order answers come and who is lost on the way may change who took part,
and nothing else: the same participants give the same bits as one process does.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
from bytes_encoder import write_encoder, write_texts
from devices_at_hand import PostAtHand, parts, prepare_once, remembered, remote_at_hand

from tesserafl.core.coverage import Coverage
from tesserafl.core.errors import ConfigError
from tesserafl.core.messages import Memory, Task, Update
from tesserafl.core.params import sha256
from tesserafl.engines.federation import Federation
from tesserafl.engines.local import InProcess
from tesserafl.engines.pool import WorkerPool
from tesserafl.engines.process import threads
from tesserafl.engines.processes import Processes
from tesserafl.engines.remote import Remote
from tesserafl.engines.seam import Done, Engine, Failed, Outcome, Reason
from tesserafl.run.begin import first_federation
from tesserafl.run.experiment import from_json
from tesserafl.run.player import Player, player_of
from tesserafl.run.rounds import Notes
from tesserafl.run.setup import Setup, make_engine, prepare

# One process of pytest-xdist: a second one would start every engine again.
pytestmark = [
    pytest.mark.xdist_group("engines"),
    # peft reads an attribute that transformers has renamed.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

Settings = dict[str, Any]
Begin = Callable[[Setup], Engine]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """An engine, and what a test must know of it."""

    begin: Begin
    """Start it for an experiment, ready for tasks."""
    kill: Callable[[Engine], None] | None = None
    """End a worker without a word, while it works or before; None: there is none to end."""
    remembered: Callable[[Engine], Mapping[int, Memory]] = lambda engine: engine.memories
    """What its clients keep between rounds, wherever that is."""
    cannot: Collection[str] = ()
    """Names of experiments that are refused on it."""
    needs: str | None = None
    """A package that may be missing."""


def embedded(**settings: Any) -> Begin:
    """An engine that `make_engine` makes for these settings."""

    def begin(setup: Setup) -> Engine:
        engine = replace(setup.experiment.engine, **settings)
        return make_engine(replace(setup, experiment=replace(setup.experiment, engine=engine)))

    return begin


def kill_process(engine: Engine) -> None:
    assert isinstance(engine, WorkerPool) and isinstance(engine.workers, Processes)
    engine.workers.running[0].process.kill()


def kill_actor(engine: Engine) -> None:
    import ray

    assert isinstance(engine, WorkerPool)
    ray.kill(engine.workers.actors[0])


@dataclass(kw_only=True)
class AtHand:
    """Devices in this process, with their disks."""

    remote: Remote
    disk: tempfile.TemporaryDirectory[str]
    patch: pytest.MonkeyPatch

    @property
    def folder(self) -> Path:
        return Path(self.disk.name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.remote, name)

    def close(self) -> None:
        self.remote.close()
        self.patch.undo()
        self.disk.cleanup()


def at_hand(setup: Setup) -> Engine:
    patch, disk = pytest.MonkeyPatch(), tempfile.TemporaryDirectory()
    prepare_once(patch)
    return AtHand(remote=remote_at_hand(setup, Path(disk.name)), disk=disk, patch=patch)


def restart_device(engine: Engine) -> None:
    """It begins anew with what lies on its disk."""
    assert isinstance(engine, AtHand) and isinstance(engine.remote.post, PostAtHand)
    engine.remote.post.residents.update(parts(engine.folder, engine.remote.seated))


def on_disks(engine: Engine) -> Mapping[int, Memory]:
    engine = getattr(engine, "engine", engine)  # of those below that do something to one
    assert isinstance(engine, AtHand)
    return remembered(engine.remote, engine.folder)


KINDS: dict[str, Kind] = {
    "in process": Kind(begin=embedded(workers=1)),
    "processes": Kind(begin=embedded(workers=2), kill=kill_process),
    "ray": Kind(begin=embedded(kind="ray", workers=2), kill=kill_actor, needs="ray"),
    "devices": Kind(
        begin=at_hand,
        kill=restart_device,
        remembered=on_disks,
        cannot=("fedbrb together", "fedbuff"),  # they train alone, and have a time of their own
    ),
}

DIGITS: Settings = {
    "data": {"num_clients": 6, "max_train": 240, "max_test": 60},
    "model": {"name": "mlp", "hidden": [16, 16]},
    "training": {"momentum": 0.5},
    "engine": {"batching": "sequential"},
    "rounds": 4,
    "clients_per_round": 4,
    "checkpoint_every": 2,
}
RATIO = [0.5, 0.25]
MSFUSION: Settings = {"name": "msfusion", "ratio": RATIO, "contrast": 0.5, "momentum": "carry"}
TEXTS: Settings = {
    **DIGITS,
    "data": {"partition": "iid", "num_clients": 4, "sequence_length": 12, "validation": 0.2},
    "training": {"lr": 0.1, "batch_size": 8},
    "clients_per_round": 3,
}
PHONES: Settings = {
    "profiles": ["phone", "laptop", "raspberry-pi-4"],
    "load": [0.1, 0.8],
    "load_minutes": 0.002,
}

EXPERIMENTS: dict[str, Settings] = {
    "fedavg": {**DIGITS, "method": {"name": "fedavg"}, "dropout": 0.3},
    "fedbrb": {**DIGITS, "method": {"name": "fedbrb", "ratio": RATIO}},
    # What goes down is rounded, what comes up too, and clients keep what is lost of it.
    "fedbrb in fewer bytes": {
        **DIGITS,
        "method": {"name": "fedbrb", "ratio": RATIO},
        "compression": {"deltas": "int8", "params": "bfloat16"},
    },
    "fedbrb together": {
        **DIGITS,
        "method": {"name": "fedbrb", "ratio": RATIO},
        "engine": {"batching": "vmapped", "group": 2},
    },
    # Clients keep momentum, and send to each other.
    "msfusion": {**DIGITS, "method": MSFUSION, "network": {"topology": "peers"}},
    "flm": {
        **DIGITS,
        "method": {"name": "flm", "depth": [2, 1], "warmup": 1, "cooldown": 1},
        "model": {"name": "residual", "stream": 16, "blocks": 3},
    },
    # An answer makes a model, in virtual time: what is late is folded later.
    "fedbuff": {
        **DIGITS,
        "method": {"name": "fedbuff"},
        "fleet": PHONES,
        "clock": {"mode": "asynchronous", "buffer": 2, "concurrency": 3},
    },
    # An expert of its own stays with every client.
    "fedfmsl": {
        **TEXTS,
        "method": {"name": "fedfmsl", "ratio": [1.0], "start": 1, "step": 1, "patience": 2},
    },
    "hetlora": {**TEXTS, "method": {"name": "hetlora", "ratio": [1.0, 0.5]}},
}
MAIN = "msfusion"
"""What an engine is started with where one start serves many tests."""


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts and an encoder")
    write_texts(folder / "texts", 60)
    write_encoder(folder / "encoder", 2)
    return folder


@cache
def setup_of(name: str, files: Path) -> Setup:
    settings = EXPERIMENTS[name]
    if settings["method"]["name"] in ("fedfmsl", "hetlora"):
        pytest.importorskip("peft")
        settings = {
            **settings,
            "data": {**settings["data"], "path": str(files / "texts")},
            "model": {"name": "lora", "rank": 2, "config": str(files / "encoder")},
        }
    return prepare(from_json(settings))


@dataclass(frozen=True, kw_only=True)
class Played:
    """What a run came to. Equal for equal bits."""

    params: str
    memories: Mapping[int, str]
    rounds: tuple[Any, ...]
    """Of each round what its clients told, and who failed."""


def begun(setup: Setup, engine: Engine) -> tuple[Federation, Player]:
    federation = first_federation(setup)
    return federation, player_of(setup, engine, federation, setup.costs())


def went_on(
    setup: Setup, engine: Engine, federation: Federation, player: Player, kind: Kind
) -> Played:
    coverage, rounds = Coverage({n: tuple(t.shape) for n, t in federation.shapes.items()}), []
    with threads(1):
        while not player.over:
            rounds.append(told(player.play(coverage)))
    memories = {client: sha256(memory) for client, memory in kind.remembered(engine).items()}
    params = sha256(federation.assembled().params)
    return Played(params=params, memories=memories, rounds=tuple(rounds))


def told(notes: Notes) -> Any:
    rows = [{key: row[key] for key in row if key != "seconds"} for row in notes.clients]
    failed = {(row["client"], row["reason"]) for row in notes.failures}
    return sorted(rows, key=lambda row: int(row["client"])), failed


def played(setup: Setup, engine: Engine, kind: Kind) -> Played:
    engine.restore({})
    return went_on(setup, engine, *begun(setup, engine), kind)


@cache
def expected(name: str, files: Path) -> Played:
    """What one process comes to."""
    setup = setup_of(name, files)
    return played(setup, embedded(workers=1)(setup), KINDS["in process"])


def same(found: Played, wanted: Played) -> None:
    assert found.params == wanted.params
    assert found.rounds == wanted.rounds
    assert found.memories == wanted.memories


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A Ray instance for all tests: to start one takes seconds."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            address="local",  # a new one, whatever runs on this machine
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=80 << 20,  # nearly the least that Ray takes
            logging_level="error",
        )
        yield
        ray.shutdown()


def kind_of(name: str, request: pytest.FixtureRequest) -> Kind:
    kind = KINDS[name]
    if kind.needs is not None:
        if importlib.util.find_spec(kind.needs) is None:
            pytest.skip(f"{kind.needs} is not installed: pip install 'tesserafl[{kind.needs}]'")
        request.getfixturevalue("cluster")
    return kind


@pytest.fixture(scope="module", params=KINDS)
def started(request: pytest.FixtureRequest, files: Path) -> Iterator[tuple[Kind, Setup, Engine]]:
    """Every engine, started once with the main experiment."""
    kind, setup = kind_of(request.param, request), setup_of(MAIN, files)
    with contextlib.closing(kind.begin(setup)) as engine:
        yield kind, setup, engine


def tasks_of(setup: Setup) -> list[Task]:
    """The first round's tasks."""
    return list(first_federation(setup).tasks(setup.cohort(0), setup.experiment.training))


def asked(engine: Engine, groups: Sequence[Sequence[Task]]) -> dict[int, Outcome]:
    """Submit all; the outcomes by client, of which there is one each. Tensors may be gone."""
    outcomes: dict[int, Outcome] = {}
    for group in groups:
        engine.submit(group)
    awaited = {task.client.id for group in groups for task in group}
    while outcomes.keys() != awaited:
        found = engine.poll()
        assert found, "poll must not come back with nothing"
        for outcome in found:
            assert outcome.client in awaited and outcome.client not in outcomes
            if isinstance(outcome, Done):
                assert outcome.seconds > 0
                outcome = replace(outcome, update=kept(outcome.update))
            outcomes[outcome.client] = outcome
    return outcomes


def kept(update: Update) -> Update:
    """A copy: an engine may use an update's memory again when it is asked for the next."""
    delta = {name: tensor.clone() for name, tensor in update.delta.items()}
    extra = {name: tensor.clone() for name, tensor in update.extra.items()}
    return replace(update, delta=delta, extra=extra)


def bits(outcomes: Mapping[int, Outcome]) -> dict[int, Any]:
    return {
        client: (sha256(done.update.delta), sha256(dict(done.update.extra)), done.update.metrics)
        for client, done in outcomes.items()
        if isinstance(done, Done)
    }


def alone(setup: Setup, tasks: Sequence[Task]) -> dict[int, Any]:
    """What clients without memories answer in one process."""
    with threads(1):
        return bits(asked(embedded(workers=1)(setup), [[task] for task in tasks]))


# The same participants give the same bits.


QUICK = {
    ("devices", "fedavg"),
    ("devices", "fedbrb"),
    ("devices", "fedbrb in fewer bytes"),
    ("devices", "fedfmsl"),
    ("devices", "hetlora"),
}
"""Two workers import and load for five seconds each: one such start is enough in every check."""
STARTED_ALONE = [
    pytest.param(name, method, marks=[] if (name, method) in QUICK else pytest.mark.slow)
    for name, kind in KINDS.items()
    for method in EXPERIMENTS
    if name != "in process" and method != MAIN and method not in kind.cannot
]


@pytest.mark.parametrize(("name", "method"), STARTED_ALONE)
def test_every_method_gives_the_bits_of_one_process(
    name: str, method: str, files: Path, request: pytest.FixtureRequest
) -> None:
    kind, setup = kind_of(name, request), setup_of(method, files)
    with contextlib.closing(kind.begin(setup)) as engine:
        same(played(setup, engine, kind), expected(method, files))


def test_the_experiments_can_tell_engines_apart(files) -> None:
    """Guards the tests above: runs train, some clients remember, and no two come to one model."""
    runs = [expected(name, files) for name in EXPERIMENTS if name != "fedbrb together"]
    assert len({run.params for run in runs}) == len(runs)
    assert expected(MAIN, files).memories
    assert any(failed for _, failed in expected("fedavg", files).rounds)
    for run in runs:
        assert all(row["loss"] > 0 for rows, _ in run.rounds for row in rows)


# Capacity and groups.


def test_a_run_gives_the_bits_of_one_process(started, files) -> None:
    kind, setup, engine = started
    same(played(setup, engine, kind), expected(MAIN, files))


def test_every_task_of_a_full_engine_and_of_its_queue_is_answered_once(started) -> None:
    _, setup, engine = started
    engine.restore({})
    tasks = tasks_of(setup)
    assert engine.capacity >= 1 and engine.group >= 1 and len(tasks) > engine.capacity
    assert bits(asked(engine, [[task] for task in tasks])) == alone(setup, tasks)


def test_a_group_is_answered_for_each_of_its_tasks(started) -> None:
    _, setup, engine = started
    if engine.group == 1 and not isinstance(engine, InProcess | WorkerPool):
        pytest.skip("its clients are devices")
    engine.restore({})
    tasks = tasks_of(setup)
    by_shape = itertools.groupby(
        sorted(tasks, key=lambda task: task.submodel.num_entries),
        key=lambda task: task.submodel.num_entries,
    )
    groups = [list(group) for _, group in by_shape]
    assert max(map(len, groups)) > 1
    assert bits(asked(engine, groups)) == alone(setup, tasks)


# What clients remember.


def test_a_run_goes_on_from_what_was_held(started, files) -> None:
    kind, setup, engine = started
    engine.restore({})
    federation, player = begun(setup, engine)
    coverage = Coverage({n: tuple(t.shape) for n, t in federation.shapes.items()})
    with threads(1):
        for _ in range(2):
            player.play(coverage)
    held, memories = player.held(), copied(engine.memories)
    assert memories
    played(setup, engine, kind)  # something else
    engine.restore(memories)
    federation, player = begun(setup, engine)
    player.restore(held)
    rest = went_on(setup, engine, federation, player, kind)
    wanted = expected(MAIN, files)
    assert rest.params == wanted.params and rest.memories == wanted.memories
    assert rest.rounds == wanted.rounds[2:]


def copied(memories: Mapping[int, Memory]) -> dict[int, Memory]:
    return {
        client: {name: tensor.clone() for name, tensor in memory.items()}
        for client, memory in memories.items()
    }


def test_what_was_restored_is_there_and_comes_to_the_clients(started) -> None:
    _, setup, engine = started
    tasks = tasks_of(setup)
    later = [replace(task, round=1) for task in tasks]
    engine.restore({})
    first = bits(asked(engine, [[task] for task in tasks]))
    memories = copied(engine.memories)
    assert memories.keys() == first.keys()
    second = bits(asked(engine, [[task] for task in later]))
    assert second.keys() == first.keys() and second != alone(setup, later)  # momentum goes on
    engine.restore({})
    assert not engine.memories
    assert bits(asked(engine, [[task] for task in tasks])) == first
    engine.restore(memories)
    assert {c: sha256(m) for c, m in engine.memories.items()} == {
        c: sha256(m) for c, m in memories.items()
    }
    assert bits(asked(engine, [[task] for task in later])) == second


# What is lost.


def test_a_client_that_cannot_do_its_task_has_failed_and_the_others_have_not(started) -> None:
    _, setup, engine = started
    engine.restore({})
    good, bad, *others = tasks_of(setup)
    wrong = replace(bad, training=replace(bad.training, momentum=0.0))  # there is none to carry
    outcomes = asked(engine, [[good], [wrong], *([task] for task in others)])
    failed = outcomes.pop(bad.client.id)
    assert isinstance(failed, Failed) and failed.reason == "error"
    assert "momentum" in failed.text
    assert bits(outcomes) == alone(setup, [good, *others])
    assert bad.client.id not in engine.memories


@pytest.mark.parametrize("when", ["at work", pytest.param("idle", marks=pytest.mark.slow)])
def test_a_worker_that_is_killed_costs_time_and_not_a_bit(started, when) -> None:
    kind, setup, engine = started
    if kind.kill is None:
        pytest.skip("nothing to kill")
    engine.restore({})
    tasks = tasks_of(setup)
    if when == "idle":
        kind.kill(engine)
        time.sleep(0.5)  # until everybody knows
        killed = engine
    else:
        killed = Killing(engine=engine, kill=kind.kill)
    assert bits(asked(killed, [[task] for task in tasks])) == alone(setup, tasks)


@dataclass(kw_only=True)
class Killing:
    """An engine that loses a worker between the first group's submission and its answer."""

    engine: Engine
    kill: Callable[[Engine], None]
    _alive: bool = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def submit(self, tasks: Sequence[Task]) -> None:
        self.engine.submit(tasks)
        if self._alive:
            self.kill(self.engine)
        self._alive = False


@dataclass(kw_only=True)
class Losing:
    """An engine to some of whose clients something happens before they work."""

    engine: Engine
    reason: Reason
    lost: frozenset[tuple[int, int]]
    """(round, client)"""
    _failed: list[Outcome] = field(default_factory=list)
    _under_way: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def submit(self, tasks: Sequence[Task]) -> None:
        rest = []
        for task in tasks:
            if (task.round, task.client.id) in self.lost:
                text = f"lost for this test: {self.reason}"
                self._failed.append(Failed(client=task.client.id, reason=self.reason, text=text))
            else:
                rest.append(task)
        if rest:
            self.engine.submit(rest)
            self._under_way += len(rest)

    def poll(self) -> list[Outcome]:
        found, self._failed = self._failed, []
        if self._under_way and not found:
            found = self.engine.poll()
            self._under_way -= len(found)
        return found


LOST = frozenset({(0, 0), (0, 3), (1, 1), (2, 2), (2, 5), (3, 4), (3, 0)})


@cache
def dropped_out(method: str, files: Path) -> Played:
    """A run in which the lost ones did not answer when they were asked."""
    setup = setup_of(method, files)
    engine = embedded(workers=1)(setup)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Setup, "answers", lambda self, r, client: (r, client.id) not in LOST)
        return played(setup, engine, KINDS["in process"])


def test_who_is_lost_for_whatever_reason_has_only_not_taken_part(started, files) -> None:
    kind, setup, engine = started
    wanted = dropped_out(MAIN, files)
    assert wanted.params != expected(MAIN, files).params
    for reason in get_args(Reason):
        found = played(setup, Losing(engine=engine, reason=reason, lost=LOST), kind)
        lost = [failed for _, failed in found.rounds]
        assert set().union(*lost) and all(why == reason for each in lost for _, why in each)
        same(replace(found, rounds=as_offline(found)), wanted)


def as_offline(run: Played) -> tuple[Any, ...]:
    return tuple(
        (rows, {(client, "offline") for client, _ in failed}) for rows, failed in run.rounds
    )


# The order of arrival.


@dataclass(kw_only=True)
class Shuffling:
    """An engine whose answers all wait for the last one, and come singly in another order."""

    engine: Engine
    order: Callable[[list[Outcome]], list[Outcome]]
    capacity: int = 100
    _under_way: int = 0
    _outcomes: list[Outcome] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def submit(self, tasks: Sequence[Task]) -> None:
        self.engine.submit(tasks)
        self._under_way += len(tasks)

    def poll(self) -> list[Outcome]:
        while self._under_way:
            for found in self.engine.poll():
                self._under_way -= 1
                if isinstance(found, Done):
                    found = replace(found, update=kept(found.update))
                self._outcomes.append(found)
            if not self._under_way:
                self._outcomes = self.order(self._outcomes)
        return [self._outcomes.pop(0)]


ORDERS: dict[str, Callable[[list[Outcome]], list[Outcome]]] = {
    "backwards": lambda found: found[::-1],
    "by client": lambda found: sorted(found, key=lambda outcome: outcome.client),
    "odd ones first": lambda found: sorted(found, key=lambda o: (o.client % 2 == 0, -o.client)),
}


@pytest.mark.parametrize("method", ["fedavg", "fedbrb", MAIN, "flm", "fedbuff", "fedfmsl"])
def test_answers_may_come_in_any_order(method: str, files: Path) -> None:
    setup = setup_of(method, files)
    for order in ORDERS.values():
        engine = Shuffling(engine=embedded(workers=1)(setup), order=order)
        same(played(setup, engine, KINDS["in process"]), expected(method, files))


def test_answers_of_an_engine_may_come_in_any_order(started, files) -> None:
    kind, setup, engine = started
    shuffling = Shuffling(engine=engine, order=ORDERS["backwards"])
    same(played(setup, shuffling, kind), expected(MAIN, files))


# The end. Last in this file: an engine of the module is closed here for good.


def test_it_may_be_closed_twice(started) -> None:
    _, _, engine = started
    engine.close()
    engine.close()


def test_without_its_package_an_engine_says_what_to_install(files, monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'tesserafl\[ray\]'"):
        KINDS["ray"].begin(setup_of(MAIN, files))
