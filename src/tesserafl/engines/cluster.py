"""Actors of a Ray cluster, or of a host with several GPUs, as a pool's workers.

Only bytes cross: a task or an update is one safetensors message, which Ray hands on as it is
(a value of type `bytes` is not pickled). What Ray pickles is an actor's start: this module's class
and the name of the function that loads an experiment. Ray neither knows who sends nor limits what
is sent, so the cluster must be trusted.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tesserafl.core.errors import ConfigError, TesseraError
from tesserafl.core.messages import Memory, Task
from tesserafl.core.wire import decode_task, encode_task, encode_update, unpack, update_of
from tesserafl.engines.client import ClientWorker
from tesserafl.engines.pool import Answered, Broke, Ended
from tesserafl.engines.process import threads

OWN = "local"
"""The address of a Ray instance that begins and ends with the run."""
START_SECONDS = 600.0
"""Within which actors must be placed and loaded, also the successors of lost ones."""

Load = Callable[[bytes], tuple[ClientWorker, Mapping[str, str]]]
"""From an experiment's bytes to who does its clients' work, and to what all machines must share."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one actor takes of its machine."""

    threads: int
    """CPUs: one for each thread."""
    gpus: float


class Actor:
    """Lives in an actor: keeps data, built modules and compiled steps from group to group."""

    def __init__(self, load: Load, hello: bytes, num_threads: int) -> None:
        self._load, self._hello, self._threads = load, hello, num_threads
        self._worker: ClientWorker | None = None

    def greet(self) -> bytes:
        """Load; what all machines must share, or the error, as JSON."""
        try:
            with threads(self._threads):
                self._worker, shared = self._load(self._hello)
        except TesseraError as error:
            return json.dumps({"error": str(error)}).encode()
        return json.dumps(dict(shared)).encode()

    def work(self, *messages: bytes) -> tuple[bytes, ...]:
        """Do a group; a head in JSON, then an update or an error's text for each task."""
        begun = time.perf_counter()
        assert self._worker is not None
        try:
            with threads(self._threads):
                answers = self._worker.work_together([decode_task(each) for each in messages])
        except Exception:
            head: dict[str, Any] = {"fault": traceback.format_exc()}
            return json.dumps(head).encode(), *(b"" for _ in messages)
        failed = [isinstance(answer, TesseraError) for answer in answers]
        bodies = [
            str(answer).encode() if isinstance(answer, TesseraError) else encode_update(*answer)
            for answer in answers
        ]
        head = {"failed": failed, "seconds": time.perf_counter() - begun}
        return json.dumps(head).encode(), *bodies


class Actors:
    """Actors that this process started.

    Args:
        address: of the cluster (`engine.address`).
        load: what an actor loads its experiment with; importable on every node.
        hello: the experiment.
        size: how many actors.
        share: what each takes.
        shared: what `load` must find on every node as it is here: versions, data.

    Raises:
        ConfigError: Ray is not installed, no cluster answers, or it is too small.
        TesseraError: an actor could not be loaded, or is not as this machine is.
    """

    def __init__(
        self,
        address: str,
        load: Load,
        hello: bytes,
        *,
        size: int,
        share: Share,
        shared: Mapping[str, str],
    ) -> None:
        self._ray, self._is_ours = _connected(address, size * share.threads)
        self._kind = self._ray.remote(Actor).options(
            num_cpus=share.threads,
            num_gpus=share.gpus,
            max_restarts=0,  # the pool replaces it, and knows what must be done again
            scheduling_strategy="SPREAD",
        )
        self._begin = (load, hello, share.threads)
        self._shared, self._share = dict(shared), share
        self.actors: list[Any] = []
        self._answers: dict[int, list[Any]] = {}
        """Busy actor -> references to its head and its bodies."""
        try:
            _check_size(self._ray, size, share)
            self.actors = [self._kind.remote(*self._begin) for _ in range(size)]
            self._welcome(range(size))
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self.actors)

    def send(self, number: int, asked: Sequence[tuple[Task, Memory]]) -> None:
        """Have an idle actor do a group."""
        messages = [encode_task(task, memory) for task, memory in asked]
        work = self.actors[number].work.options(num_returns=1 + len(messages))
        try:
            self._answers[number] = work.remote(*messages)
        except self._ray.exceptions.ObjectStoreFullError as error:
            raise TesseraError(
                f"Ray's store cannot hold {sum(map(len, messages))} bytes of tasks ({error}); "
                f"lower engine.workers or engine.group, or start Ray with more object store memory"
            ) from error

    def ready(self) -> Sequence[int]:
        """Those that answered or ended; waits for the first."""
        heads = {head: number for number, (head, *_) in self._answers.items()}
        self._ray.wait(list(heads), num_returns=1)
        found, _ = self._ray.wait(list(heads), num_returns=len(heads), timeout=0)
        return [heads[head] for head in found]

    def receive(self, number: int, tasks: Sequence[Task]) -> Answered | Ended | Broke:
        """What became of an actor that is ready; `tasks` are those that it was sent."""
        errors = self._ray.exceptions
        try:
            first, *bodies = self._ray.get(self._answers.pop(number))
        except (
            errors.RayActorError,
            errors.ObjectLostError,  # its answer lay on a node that is gone
            errors.NodeDiedError,
            errors.OutOfMemoryError,
        ) as error:
            return Ended(how=f"the actor ended ({_in_one_line(error)})")
        head = json.loads(first)
        if "fault" in head:
            return Broke(text=head["fault"])
        answers = [
            body.decode() if failed else update_of(*unpack(body), task)
            for task, failed, body in zip(tasks, head["failed"], bodies, strict=True)
        ]
        return Answered(answers=answers, seconds=head["seconds"])

    def replace(self, number: int) -> None:
        """Start an actor that ended anew, and wait until it is loaded."""
        self._ray.kill(self.actors[number])
        self.actors[number] = self._kind.remote(*self._begin)
        self._welcome([number])

    def close(self) -> None:
        """End them all, and the instance if it is ours."""
        actors, self.actors, self._answers = self.actors, [], {}
        for actor in actors:
            self._ray.kill(actor)
        if self._is_ours:
            self._is_ours = False
            self._ray.shutdown()

    def _welcome(self, numbers: Sequence[int]) -> None:
        """Wait until these are loaded, and see that they are as this machine is."""
        greetings = [self.actors[number].greet.remote() for number in numbers]
        loaded, waiting = self._ray.wait(
            greetings, num_returns=len(greetings), timeout=START_SECONDS
        )
        if waiting:
            raise TesseraError(
                f"{len(waiting)} of {len(greetings)} actors were not ready within "
                f"{START_SECONDS:.0f} s; each needs {self._share.threads} CPUs and "
                f"{self._share.gpus:g} GPUs, free are now "
                f"{_resources(self._ray.available_resources())}"
            )
        for greeting in loaded:
            try:
                found = json.loads(self._ray.get(greeting))
            except self._ray.exceptions.RayError as error:
                raise TesseraError(
                    f"an actor could not start: {error}; every node needs this version of "
                    f"tesserafl, with its extra 'ray'"
                ) from error
            if "error" in found:
                raise TesseraError(f"an actor could not load the experiment: {found['error']}")
            for key, value in self._shared.items():
                if found.get(key) != value:
                    raise TesseraError(
                        f"{key} is {found.get(key)!r} where an actor runs and {value!r} here, so "
                        f"results would differ; every node needs the same versions and data"
                    )


def _connected(address: str, num_cpus: int) -> tuple[Any, bool]:
    """Ray, and whether its instance is ours to end; one that the caller began is used as it is."""
    # Before the import, which reads it. Ours is quiet; a cluster's own setting is its operator's.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            f"engine.kind 'ray' needs Ray ({error}); pip install 'tesserafl[ray]', or use 'local'"
        ) from error
    if ray.is_initialized():
        return ray, False
    own = {"num_cpus": num_cpus, "include_dashboard": False} if address == OWN else {}
    try:
        ray.init(address=address, logging_level="warning", **own)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ConfigError(
            f"engine.address {address!r}: Ray does not answer ({_in_one_line(error)}); is the "
            f"cluster up (ray status), and has this machine its version of Ray, its token, and "
            f"RAY_AUTH_MODE=token?"
        ) from error
    return ray, True


def _check_size(ray: Any, size: int, share: Share) -> None:
    there = ray.cluster_resources()
    needs = {"CPU": float(size * share.threads), "GPU": size * share.gpus}
    if any(there.get(name, 0.0) < amount for name, amount in needs.items()):
        raise ConfigError(
            f"{size} actors (engine.workers) of {share.threads} CPUs (engine.threads) and "
            f"{share.gpus:g} GPUs (engine.gpus) need {_resources(needs)}; the cluster has "
            f"{_resources(there)}; lower one of them or add nodes"
        )


def _resources(amounts: Mapping[str, float]) -> str:
    return f"{amounts.get('CPU', 0.0):g} CPUs and {amounts.get('GPU', 0.0):g} GPUs"


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
