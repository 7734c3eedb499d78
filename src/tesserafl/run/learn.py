"""Learning a policy: episodes of a tuning job, and agents that learn from them; see `tuning`.

policy.safetensors, policy.json   what `method.policy` takes, written after every update
learning.jsonl                    an object a line: the start, every update, the end
config.json                       the experiment
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tesserafl.core import seeds
from tesserafl.core.decisions import Decision, Observation, decide, drawn, followed, greedy
from tesserafl.core.errors import CheckpointError, ConfigError
from tesserafl.core.params import Params
from tesserafl.core.policy import HEADER, TENSORS, Policy, policy_files
from tesserafl.core.schedule import Situation
from tesserafl.engines.process import threads
from tesserafl.run.agents import Agents, Learning
from tesserafl.run.events import Event, EventLog
from tesserafl.run.experiment import Experiment, name_of, to_json, with_absolute_paths
from tesserafl.run.files import alone_in, write_atomic, write_json
from tesserafl.run.setup import make_engine, prepare
from tesserafl.run.tuning import Episode, Gain, Price, TuningJob, Warm, tuning_job


@dataclass(frozen=True, kw_only=True)
class LearnSettings:
    """How long is learnt, and what for."""

    episodes: int = 300
    """tuning jobs that are played"""
    update_every: int = 5
    """jobs between two updates of the agents"""
    imitate: int = 3
    """jobs whose nodes all finish together (equal_finish), from which agents begin; 0: they begin
    at random, as in the papers"""
    gain: Gain = "likelihood"
    """what agents are rewarded for, in points: of the likelihood of the test's labels (e^-loss), or
    of accuracy, which jumps from round to round by more than a decision is worth"""
    joule_price: float | None = None
    """epsilon: points that a joule costs; None: a seventh of what the first round
    gains, divided by its joules"""
    own_energy: bool = False
    """whether an agent pays for the energy of its own edge alone (tomtit)"""
    charge_overrun: bool = True
    """whether a round that ends after the threshold time counts only up to it"""
    components: int = 8
    """coordinates of a model that agents see, at most; there are no more than edges"""

    def __post_init__(self) -> None:
        for name in ("episodes", "update_every", "components"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.imitate < 0:
            raise ConfigError(f"imitate must be 0 or more; got {self.imitate}")
        price = self.joule_price
        if price is not None and not 0 <= price < math.inf:
            raise ConfigError(f"joule_price must be 0 or more, and finite; got {price}")


def learn(
    experiment: Experiment,
    folder: Path,
    settings: LearnSettings,
    listener: Callable[[Event], None] | None = None,
) -> dict[str, Any]:
    """Learn a policy for an experiment into a new or empty folder; returns the last event.

    Raises:
        CheckpointError: the folder already holds something.
        ConfigError: the experiment has no method that learns, no tree or no threshold time.
    """
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty; choose another --out, or remove it")
    experiment = with_absolute_paths(experiment)
    if getattr(experiment.method, "policy", None) is not None:
        raise ConfigError("a policy is learnt from the beginning; leave method.policy away")
    setup = prepare(experiment)
    with (
        threads(experiment.engine.threads),
        contextlib.closing(make_engine(setup)) as engine,
    ):
        job = tuning_job(setup, engine, settings.gain)
        warm = job.warm_up(settings.components)
        folder.mkdir(parents=True, exist_ok=True)
        with alone_in(folder), contextlib.closing(EventLog(folder / "learning.jsonl")) as log:
            write_json(folder / "config.json", to_json(setup.experiment))

            def emit(event: Event) -> None:
                log.write(event)
                if listener is not None:
                    listener(event)

            return _Lesson(job, warm, settings, folder, emit).to_the_end()


class _Lesson:
    """A policy while it is learnt."""

    def __init__(
        self,
        job: TuningJob,
        warm: Warm,
        settings: LearnSettings,
        folder: Path,
        emit: Callable[[Event], None],
    ) -> None:
        self.job, self.warm, self.settings = job, warm, settings
        self.folder, self.emit = folder, emit
        self.seed, method = job.setup.experiment.seed, job.method
        actor = method.first_actor(warm.basis.num_components, job.edges, self.seed)
        self.agents = Agents(
            logits=method.logits,
            actor=actor,
            agents=method.agents(job.edges),
            seed=self.seed,
            learning=Learning(),
        )
        asked = settings.joule_price
        self.price = Price(
            joule=warm.price if asked is None else asked,
            own=settings.own_energy,
            overrun=settings.charge_overrun,
        )
        self.policy = Policy(
            method=name_of("method", method),
            options=asdict(method.options),
            edges=job.edges,
            actor=actor,
            basis=warm.basis,
        )

    def to_the_end(self) -> dict[str, Any]:
        settings = self.settings
        self.emit({"kind": "start", **asdict(settings), "joule_price": self.price.joule})
        if settings.imitate:
            jobs = [self._balanced(number) for number in range(settings.imitate)]
            self.agents.imitate([job.moments for job in jobs])
            self.emit({"kind": "imitated", "episodes": settings.imitate, **_means(jobs)})
        played: list[Episode] = []
        for number in range(settings.episodes):
            played.append(self._play(number))
            done = number + 1
            if done % settings.update_every == 0 or done == settings.episodes:
                self.agents.update([episode.moments for episode in played])
                self._write()
                self.emit({"kind": "update", "episodes": done, **_means(played)})
                played = []
        own = self._greedy()
        last = {"kind": "finish", "policy": str(self.folder), **_means([own])}
        self.emit(last)
        return last

    def _play(self, number: int) -> Episode:
        def choose(observation: Observation, seen: Situation) -> Decision:
            draw = seeds.generator(self.seed, number, seen.round, observation.agent, "decision")
            logits = self.agents.one(observation)
            return decide(observation, logits, self.job.method.options, drawn(draw))

        return self.job.play(self.warm, self.policy, self.price, choose, number)

    def _balanced(self, number: int) -> Episode:
        """All finish together; of other worlds than those that are learnt in."""
        schedule = self.job.setup.experiment.method.periods  # type: ignore[union-attr]
        options = self.job.method.options

        def choose(observation: Observation, seen: Situation) -> Decision:
            periods = schedule(self.job.setup.model, self.warm.state, seen)
            factors = len(self.agents.one(observation))
            return followed(observation, periods, factors, options)

        return self.job.play(self.warm, self.policy, self.price, choose, -1 - number)

    def _greedy(self) -> Episode:
        """The policy as it will decide, in the experiment's own world."""

        def choose(observation: Observation, seen: Situation) -> Decision:
            logits = self.agents.one(observation)
            return decide(observation, logits, self.job.method.options, greedy)

        return self.job.play(self.warm, self.policy, self.price, choose, None)

    def _write(self) -> None:
        actor: Params = {name: t.detach().clone() for name, t in self.agents.actor.items()}
        self.policy = replace(self.policy, actor=actor)
        tensors, header = policy_files(self.policy)
        write_atomic(self.folder / TENSORS, tensors)
        write_atomic(self.folder / HEADER, header)


def line_of(event: Event) -> str:
    """An event for people to read."""
    if event["kind"] == "start":
        return f"a joule costs {event['joule_price']:.4g} points"
    outcome = (
        f"return {event['return']:.2f}  accuracy {event['accuracy']:.4f}  "
        f"joules {event['joules']:.4g}  rounds {event['rounds']:.1f}"
    )
    if event["kind"] == "imitated":
        return f"what is imitated: {outcome}"
    if event["kind"] == "update":
        return f"jobs {event['episodes']}  {outcome}"
    return f"as it will decide: {outcome}\nUse it with: --method.policy {event['policy']}"


def _means(episodes: Sequence[Episode]) -> dict[str, float]:
    count = len(episodes)
    return {
        "return": sum(episode.total for episode in episodes) / count,
        "accuracy": sum(episode.metrics.accuracy for episode in episodes) / count,
        "joules": sum(episode.joules for episode in episodes) / count,
        "rounds": sum(len(episode.moments) for episode in episodes) / count,
    }
