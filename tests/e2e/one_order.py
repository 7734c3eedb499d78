"""A device answers one order; prints the largest resident bytes over those of its payload.

python one_order.py FOLDER METHOD MIB
"""

from __future__ import annotations

import gc
import json
import math
import re
import sys
from dataclasses import asdict
from pathlib import Path

from tesserafl.core.messages import Client
from tesserafl.core.wire import task_parts
from tesserafl.data import DataSettings
from tesserafl.engines.orders import Hello, Store, Work, reply_of, sealed
from tesserafl.engines.parcels import Outgoing
from tesserafl.methods import METHODS
from tesserafl.models import MLP
from tesserafl.run.children import give_back_memory
from tesserafl.run.experiment import EngineSettings, Experiment, to_json
from tesserafl.run.holding import Local
from tesserafl.run.resident import Resident
from tesserafl.run.setup import prepare

RUN = "a" * 32


def main(folder: Path, method: str, mib: int) -> None:
    """One round of one client, of which everything lies on the disk already."""
    width = math.isqrt(mib * (1 << 20) // 4 // 4)
    experiment = Experiment(
        data=DataSettings(num_clients=2, max_train=64, max_test=20),
        model=MLP(hidden=(width,) * 5, norm="none"),
        method=METHODS[method](),
        engine=EngineSettings(batching="sequential", threads=1),
        rounds=1,
        clients_per_round=1,
    )
    setup = prepare(experiment)
    resident = Resident(name="d", folder=folder, local=Local(client=0, device="cpu"))
    values, spec = to_json(experiment), asdict(setup.data.spec)
    resident.answer(sealed(Hello(run=RUN, experiment=values, spec=spec)))
    state = experiment.method.init(setup.model, 0, 1)
    clients = [Client(id=0, num_examples=32)]
    (task,) = experiment.method.configure(setup.model, state, clients, experiment.training)
    payload = sum(tensor.nbytes for tensor in task.params.values())
    outgoing = Outgoing(parts=task_parts(task, {}))
    for number, note in enumerate(outgoing.letter.parcels):
        resident.answer(sealed(Store(run=RUN), {note.sha256: outgoing.parcel(number)}))
    letter = outgoing.letter.model_dump()
    order = sealed(Work(run=RUN, client=0, remembers=None, letter=letter, most_bytes=1 << 25))
    del setup, state, task, outgoing
    gc.collect()
    give_back_memory()
    before = peak(reset=True)
    reply = resident.answer(order)
    assert reply_of(reply, 1 << 20).kind == "answer", reply_of(reply, 1 << 20)
    print(json.dumps({"payload": payload, "peak": peak() - before}))


def peak(reset: bool = False) -> int:
    """The largest resident set of this process so far, in bytes; `reset`: from now on."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
