"""A run among peers on devices, from its first round or its newest checkpoint to its report."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tesserafl.core.coverage import Coverage
from tesserafl.core.method import State
from tesserafl.core.params import num_entries
from tesserafl.engines.remote import Remote
from tesserafl.engines.turns import Examined
from tesserafl.models.costs import frozen_entries
from tesserafl.run import checkpoint as checkpoints
from tesserafl.run.begin import shapes_of
from tesserafl.run.carried import Carrier
from tesserafl.run.checkpoint import Checkpoint
from tesserafl.run.events import Event, EventLog
from tesserafl.run.experiment import name_of, to_json
from tesserafl.run.federate import exchange_of, links_of, network_of
from tesserafl.run.files import alone_in, write_json
from tesserafl.run.ledger import Ledger
from tesserafl.run.mailbag import Mailbag
from tesserafl.run.report import write_partition, write_report
from tesserafl.run.runner import Listener
from tesserafl.run.setup import Setup


def carry(
    setup: Setup, remote: Remote, folder: Path, listener: Listener | None = None
) -> dict[str, Any]:
    """Carry the letters of a run's peers to its end; returns the summary.

    Raises:
        TesseraError: no peer can go on.
    """
    with (
        alone_in(folder),
        contextlib.closing(EventLog(folder / "events.jsonl")) as log,
    ):
        write_partition(folder, setup)
        shapes = shapes_of(setup.model)
        carrier = Carrier(
            setup=setup,
            remote=remote,
            bag=Mailbag(folder=folder / "mail"),
            exchange=exchange_of(setup.experiment),
            network=network_of(setup),
            shapes=shapes,
        )
        run = _Run(setup=setup, carrier=carrier, folder=folder, log=log, listener=listener)
        return run.to_the_end()


@dataclass(kw_only=True)
class _Run:
    setup: Setup
    carrier: Carrier
    folder: Path
    log: EventLog
    listener: Listener | None
    ledger: Ledger = field(default_factory=Ledger)

    def to_the_end(self) -> dict[str, Any]:
        experiment = self.setup.experiment
        shapes = self.carrier.shapes
        coverage = Coverage({name: tuple(t.shape) for name, t in shapes.items()})
        begun = self._begin(coverage)
        for round in range(begun, experiment.rounds):
            notes = self.carrier.play(round, coverage)
            self.ledger.add(notes)
            self._emit(self.ledger.event(round + 1, notes, coverage))
            if round + 1 < experiment.rounds and (round + 1) % experiment.evaluate_every == 0:
                self._evaluate(round + 1, self.carrier.examine(round + 1, **self._asking()))
            self._checkpoint(round + 1, coverage)
        return self._finish(coverage)

    def _asking(self) -> dict[str, bool]:
        """Whom to ask: copies that are equal, and tests that are, need one answer alone."""
        gossip = self.carrier.exchange == "gossip"
        return {"all_of_them": gossip or self.setup.data.elsewhere, "keep": False}

    def _begin(self, coverage: Coverage) -> int:
        """What lies in the folder; returns the rounds that are done."""
        experiment = self.setup.experiment
        checkpoint = checkpoints.latest(self.folder / "checkpoints")
        if checkpoint is not None:
            self.log.cut(checkpoint.events_bytes)
            self.ledger.totals |= checkpoint.totals
            coverage.counts = checkpoint.coverage
            if self.listener is not None:
                self.listener({"kind": "resume", "experiment": to_json(experiment)})
            return checkpoint.states[0].round
        self.log.cut(0)
        self._emit(
            {
                "kind": "start",
                "experiment": to_json(experiment),
                "params_full": num_entries(self.carrier.shapes),
                "params_frozen": frozen_entries(self.setup.model),
                "clients": [asdict(client) for client in self.setup.clients],
                "links": links_of(self.setup),
            }
        )
        return 0

    def _checkpoint(self, rounds: int, coverage: Coverage) -> None:
        """Of what was carried: the model is with the peers."""
        self.log.sync()
        experiment = self.setup.experiment
        state = State(params={}, seed=experiment.seed, rounds=experiment.rounds, round=rounds)
        checkpoint = Checkpoint(
            states=[state],
            coverage=coverage.counts,
            memories={},
            totals=self.ledger.totals,
            events_bytes=self.log.num_bytes,
        )
        checkpoints.save(self.folder / "checkpoints", checkpoint)

    def _evaluate(self, rounds: int, found: Mapping[int, Examined]) -> tuple[float, float] | None:
        """Accuracy and loss over the tests of peers that hold a whole model; None: nobody does."""
        tested = [each for each in found.values() if each.whole and each.examples]
        total = sum(each.examples for each in tested)
        if not total:
            return None
        accuracy = sum(each.accuracy * each.examples for each in tested) / total
        loss = sum(each.loss * each.examples for each in tested) / total
        self._emit(
            {
                "kind": "evaluate",
                "round": rounds,
                "accuracy": accuracy,
                "loss": loss,
                **self.ledger.totals,
            }
        )
        return accuracy, loss

    def _finish(self, coverage: Coverage) -> dict[str, Any]:
        experiment, totals = self.setup.experiment, self.ledger.totals
        found = self.carrier.examine(experiment.rounds, all_of_them=True, keep=True)
        copies = {client: each for client, each in found.items() if each.whole}
        digests = {each.sha256 for each in copies.values()}
        tested = self._evaluate(experiment.rounds, found)
        summary: dict[str, Any] = {
            "run": str(self.folder),
            "method": name_of("method", experiment.method),
            "rounds": experiment.rounds,
            "accuracy": None if tested is None else tested[0],
            "accuracy_untrained_zeroed": None,
            "loss": None if tested is None else tested[1],
            "params_full": num_entries(self.carrier.shapes),
            "params_largest_client": int(totals["params_largest_client"]),
            "params_trained": int(totals["params_trained"]),
            "params_stored": max((each.entries for each in found.values()), default=None),
            "coverage": coverage.share,
            "bytes_down": int(totals["bytes_down"]),
            "bytes_up": int(totals["bytes_up"]),
            "flops": totals["flops"],
            "seconds": totals["seconds"],
            # Of copies that gossip there are several; of parts, none of the whole.
            "state_sha256": digests.pop() if len(digests) == 1 else None,
            "peers": [
                {"peer": client, "entries": each.entries, "sha256": each.sha256}
                for client, each in found.items()
            ],
        }
        if copies:
            summary["accuracy_peers"] = [each.accuracy for each in copies.values()]
        self._emit({"kind": "finish", **summary})
        self.log.sync()
        write_report(self.folder, self.setup)
        write_json(self.folder / "summary.json", summary)
        self.carrier.bag.drop(experiment.rounds)
        return summary

    def _emit(self, event: Event) -> None:
        self.log.write(event)
        if self.listener is not None:
            self.listener(event)
