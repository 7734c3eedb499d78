"""A run from its first round, or its newest checkpoint, to its report."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tesserafl.core.coverage import Coverage
from tesserafl.core.errors import CheckpointError
from tesserafl.core.method import Predictor, State
from tesserafl.core.metrics import Metrics
from tesserafl.core.params import Params, num_entries, sha256
from tesserafl.engines.federation import Federation
from tesserafl.engines.process import threads
from tesserafl.engines.seam import Engine
from tesserafl.models.costs import frozen_entries
from tesserafl.run import checkpoint as checkpoints
from tesserafl.run.begin import first_federation
from tesserafl.run.checkpoint import Checkpoint
from tesserafl.run.costs import CostTable
from tesserafl.run.evaluate import Evaluator
from tesserafl.run.events import Event, EventLog
from tesserafl.run.experiment import (
    Experiment,
    from_json,
    name_of,
    to_json,
    with_absolute_paths,
)
from tesserafl.run.export import export_model
from tesserafl.run.federate import links_of
from tesserafl.run.files import alone_in, read_json, write_json
from tesserafl.run.ledger import Ledger
from tesserafl.run.personal import Judging, personal_accuracies
from tesserafl.run.player import Player, player_of
from tesserafl.run.report import write_partition, write_report
from tesserafl.run.setup import Setup, evaluator_of, make_engine, prepare

Listener = Callable[[Event], None]
"""Called with every event as it is written, for progress bars."""
MakePlayer = Callable[[Setup, Engine, Federation, CostTable], Player]
"""What plays the rounds of a run."""


def start(experiment: Experiment, folder: Path, listener: Listener | None = None) -> dict[str, Any]:
    """Run an experiment into a new or empty folder; returns the summary.

    Raises:
        CheckpointError: the folder already holds something.
    """
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(
            f"{folder} is not empty; choose another --out, remove it, or continue that run with: "
            f"tessera resume {folder}"
        )
    experiment = with_absolute_paths(experiment)
    # All that a bad setting can break comes before anything is written: it leaves no folder.
    setup = prepare(experiment)
    federation = first_federation(setup)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", to_json(setup.experiment))
    return play(setup, federation, folder, make_engine(setup), listener)


def resume(folder: Path, listener: Listener | None = None) -> dict[str, Any]:
    """Continue a run from its newest checkpoint; a finished run returns its summary."""
    experiment = from_json(read_json(folder / "config.json"))
    if (folder / "summary.json").exists():
        summary: dict[str, Any] = read_json(folder / "summary.json")
        return summary
    setup = prepare(experiment)
    federation = first_federation(setup)
    return play(setup, federation, folder, make_engine(setup), listener)


def play(
    setup: Setup,
    federation: Federation,
    folder: Path,
    engine: Engine,
    listener: Listener | None = None,
    player: MakePlayer = player_of,
    judge: Judging | None = None,
) -> dict[str, Any]:
    """Play a run on an engine, from its newest checkpoint; closes the engine.

    Returns the summary. `judge` measures clients' own models, where these are elsewhere.
    """
    with (
        contextlib.closing(engine),
        alone_in(folder),
        threads(setup.experiment.engine.threads),
        contextlib.closing(EventLog(folder / "events.jsonl")) as log,
    ):
        write_partition(folder, setup)
        run = _Run(
            setup=setup,
            engine=engine,
            federation=federation,
            folder=folder,
            log=log,
            listener=listener,
            player=player,
            judge=judge,
        )
        return run.to_the_end()


@dataclass(kw_only=True)
class _Run:
    setup: Setup
    engine: Engine
    federation: Federation
    folder: Path
    log: EventLog
    listener: Listener | None
    player: MakePlayer
    judge: Judging | None
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def totals(self) -> dict[str, float]:
        """What the rounds add up to."""
        return self.ledger.totals

    def to_the_end(self) -> dict[str, Any]:
        experiment, federation = self.setup.experiment, self.federation
        costs = self.setup.costs()
        evaluator = evaluator_of(self.setup)
        player = self.player(self.setup, self.engine, federation, costs)
        coverage = self._begin(player)
        while not player.over:
            notes = player.play(coverage)
            self.ledger.add(notes)
            largest = max(self.totals["params_largest_client"], costs.largest_client)
            self.totals["params_largest_client"] = largest
            self._emit(self.ledger.event(federation.round, notes, coverage))
            last = player.over
            if last or federation.round % experiment.evaluate_every == 0:
                self._evaluate(federation.assembled(), evaluator)
            if last or federation.round % experiment.checkpoint_every == 0:
                self._checkpoint(player, coverage)
        return self._finish(federation.assembled(), coverage, evaluator)

    def _begin(self, player: Player) -> Coverage:
        experiment, federation = self.setup.experiment, self.federation
        coverage = Coverage({name: tuple(t.shape) for name, t in federation.shapes.items()})
        checkpoint = checkpoints.latest(self.folder / "checkpoints")
        if checkpoint is None:
            self.log.cut(0)
            self._emit(
                {
                    "kind": "start",
                    "experiment": to_json(experiment),
                    "params_full": num_entries(federation.shapes),
                    "params_frozen": frozen_entries(self.setup.model),
                    "clients": [asdict(client) for client in self.setup.clients],
                    "links": links_of(self.setup),
                }
            )
        else:
            self.log.cut(checkpoint.events_bytes)
            self.engine.restore(checkpoint.memories)
            self.ledger.totals |= checkpoint.totals
            self._refuse_other_shapes(checkpoint.coverage)
            player.restore(
                (checkpoint.states, dict(checkpoint.federation), dict(checkpoint.tensors))
            )
            coverage.counts = checkpoint.coverage
            if self.listener is not None:  # not an event of the run: it was written when it began
                self.listener({"kind": "resume", "experiment": to_json(experiment)})
        return coverage

    def _refuse_other_shapes(self, found: Params) -> None:
        expected = {name: tensor.shape for name, tensor in self.federation.shapes.items()}
        if {name: tensor.shape for name, tensor in found.items()} != expected:
            raise CheckpointError(
                f"the checkpoint in {self.folder} is of another model than its config.json says; "
                f"was config.json edited? Put it back, or run it into a new folder"
            )

    def _predictor(self, state: State) -> Predictor:
        return self.setup.experiment.method.predictor(self.setup.model, state)

    def _evaluate(self, state: State, evaluator: Evaluator) -> None:
        metrics = evaluator.evaluate(self._predictor(state), self.setup.data.test)
        self._emit(
            {
                "kind": "evaluate",
                "round": state.round,
                "accuracy": metrics.accuracy,
                "loss": metrics.loss,
                **self._validation(state, evaluator),
                **self.totals,
            }
        )

    def _validation(self, state: State, evaluator: Evaluator) -> dict[str, float]:
        """Over the validation examples of all clients together, where they keep some."""
        held = [c.validation for c in self.setup.data.clients if len(c.validation)]
        if not held:
            return {}
        predictor = self._predictor(state)
        total = sum((evaluator.evaluate(predictor, examples) for examples in held), Metrics())
        return {"validation_accuracy": total.accuracy, "validation_loss": total.loss}

    def _checkpoint(self, player: Player, coverage: Coverage) -> None:
        self.log.sync()
        states, values, tensors = player.held()
        checkpoint = Checkpoint(
            states=states,
            federation=values,
            tensors=tensors,
            coverage=coverage.counts,
            memories=self.engine.memories,
            totals=self.totals,
            events_bytes=self.log.num_bytes,
        )
        checkpoints.save(self.folder / "checkpoints", checkpoint)

    def _finish(self, state: State, coverage: Coverage, evaluator: Evaluator) -> dict[str, Any]:
        predictor, data = self._predictor(state), self.setup.data
        export_model(predictor, self.folder / "model", data)
        metrics = zeroed = evaluator.evaluate(predictor, data.test)
        if coverage.share < 1.0:
            kept = coverage.zero_untrained(predictor.params, predictor.part)
            zeroed = evaluator.evaluate(predictor, data.test, kept)
        local = [
            evaluator.evaluate(predictor, c.test).accuracy for c in data.clients if len(c.test)
        ]
        summary: dict[str, Any] = {
            "run": str(self.folder),
            "method": name_of("method", self.setup.experiment.method),
            "rounds": state.round,
            "accuracy": metrics.accuracy,
            "accuracy_untrained_zeroed": zeroed.accuracy,
            "loss": metrics.loss,
            "params_full": num_entries(state.params),
            "params_largest_client": int(self.totals["params_largest_client"]),
            "params_trained": int(self.totals["params_trained"]),
            "coverage": coverage.share,
            "bytes_down": int(self.totals["bytes_down"]),
            "bytes_up": int(self.totals["bytes_up"]),
            "flops": self.totals["flops"],
            "seconds": self.totals["seconds"],
            "state_sha256": sha256(state.params),
        }
        for key in ("virtual_seconds", "joules"):
            if key in self.totals:
                summary[key] = self.totals[key]
        if predictor.part is not None:
            summary["params_served"] = predictor.model.num_entries
        if frozen := frozen_entries(self.setup.model):
            summary["params_frozen"] = frozen
            summary["trainable_share"] = summary["params_trained"] / frozen
        if local:
            summary["accuracy_clients"] = local
        summary |= personal_accuracies(
            self.setup, self.engine, self.federation, evaluator, self.judge
        )
        if copies := self.federation.copies():
            summary["accuracy_peers"] = self._of_copies(copies, evaluator)
        self._emit({"kind": "finish", **summary})
        self.log.sync()
        write_report(self.folder, self.setup)
        write_json(self.folder / "summary.json", summary)
        return summary

    def _of_copies(self, copies: Mapping[int, State], evaluator: Evaluator) -> list[float]:
        """Accuracy of every peer's own copy; those that share one are measured once."""
        known: dict[int, float] = {}
        for state in copies.values():
            if id(state) not in known:
                metrics = evaluator.evaluate(self._predictor(state), self.setup.data.test)
                known[id(state)] = metrics.accuracy
        return [known[id(state)] for state in copies.values()]

    def _emit(self, event: Event) -> None:
        self.log.write(event)
        if self.listener is not None:
            self.listener(event)
