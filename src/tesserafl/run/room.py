"""Whether a device with data of its own has the memory for the part that it would train."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from tesserafl.core.errors import CapacityError
from tesserafl.core.messages import Client
from tesserafl.core.method import State
from tesserafl.engines.edge_orders import EdgeDevice
from tesserafl.engines.orders import Profile
from tesserafl.run.begin import is_lean, without_values
from tesserafl.run.costs import CostTable
from tesserafl.run.first import first_state
from tesserafl.run.rounds import check_memory
from tesserafl.run.setup import Setup, with_depths

_MIB = 1 << 20


def client_of(number: int, profile: Profile | EdgeDevice) -> Client:
    """The client that a device with data of its own is under a number."""
    return Client(
        id=number,
        num_examples=profile.num_examples,
        memory_bytes=None if profile.memory_mib is None else int(profile.memory_mib * _MIB),
    )


@dataclass(kw_only=True)
class Room:
    """What the experiment's method deals to client numbers, beside what devices have."""

    setup: Setup
    _costs: CostTable = field(init=False)
    _state: State | None = None

    def __post_init__(self) -> None:
        self._costs = self.setup.costs()

    @property
    def deals(self) -> int:
        """Clients whose numbers differ by so many are dealt alike."""
        method = self.setup.experiment.method
        dealt = [getattr(method, name, ()) for name in ("ratio", "depth", "caps")]
        gflops = self.setup.experiment.client_gflops
        return math.lcm(*(max(1, len(each)) for each in (*dealt, gflops)))

    def lacks(self, number: int, profile: Profile) -> str | None:
        """Why a device cannot be the client of this number; None: it can."""
        if profile.memory_mib is None:
            return None
        alone = replace(self.setup, clients=(client_of(number, profile),))
        try:
            check_memory(with_depths(alone), self._first, self._costs)
        except CapacityError as error:
            return f"too little memory: {error}"
        return None

    @property
    def _first(self) -> State:
        """The state before the first round, without values: a cut of it costs nothing."""
        if self._state is None and is_lean(self.setup.experiment):  # nobody makes the whole
            self._state = without_values(self.setup)
        if self._state is None:
            state = first_state(self.setup.experiment, self.setup.model, self.setup.data)
            params = {name: tensor.to("meta") for name, tensor in state.params.items()}
            self._state = replace(state, params=params)
        return self._state
