"""What a federated method is: five answers, no loop.

    init        the state before the first round
    configure   who gets which part                      -> Tasks
    local       what a client does with its part         -> Fit            (on the client)
    report      what goes back                           -> Update         (on the client)
    aggregate   how the updates become the next state    -> State
    predictor   how the result predicts                  -> Model, Params

Hooks are pure: they never change an argument, and the same arguments give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from tesserafl.core.exactsum import ExactSum
from tesserafl.core.fit import Fit, Fitted, Forward, Training, WidthScaling
from tesserafl.core.messages import Client, Memory, Options, Task, Update
from tesserafl.core.model import CLASSES, Model, Output
from tesserafl.core.params import Params, subtract
from tesserafl.core.submodel import Index, SubModel, index_tensor, merge

PUBLIC_INPUTS, PUBLIC_LABELS = "public/inputs", "public/labels"
"""In `State.extra` of a method that `reads_public`: what the server holds, as a model takes it."""
Topology = Literal["star", "tree", "peers"]
Weighting = Literal["uniform", "examples"]


@dataclass(frozen=True, kw_only=True)
class State:
    """What is kept between rounds, by the server or by every peer; a checkpoint holds this."""

    params: Params
    """The global model, theta."""
    seed: int
    """The run's seed: schedules that draw, draw from it."""
    rounds: int
    """T in the papers: how many rounds are planned, for schedules that anneal."""
    round: int = 0
    """t in the papers, from 0."""
    notes: Options = field(default_factory=dict)
    """Further plain values of a method."""
    extra: Params = field(default_factory=dict)
    """Further tensors of a method."""


class Rule(Protocol):
    """An answer from several calls of a model: a frozen dataclass that knows no family."""

    def __call__(self, forward: Forward, params: Params, inputs: Tensor) -> Output:
        """The answer for inputs [batch, ...]; `params` may hold more than the model's own."""
        ...


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """How a state predicts: a model and its parameters."""

    model: Model
    params: Params
    rule: Rule | None = None
    """How the answer comes from more than one call of the model; None: it is the model's own."""
    part: SubModel | None = None
    """The part of the state's parameters that these are, by their own names; None: all of them."""


class Method(Protocol):
    """The seam between methods and engines; see the module's docstring for the order."""

    topology: ClassVar[Topology]
    """The shape of the federation that the method is made for."""

    @property
    def entrywise(self) -> bool:
        """Whether `aggregate` is `average_trained`: every entry by itself, nothing else learnt.

        Peers can then fuse just the part that they keep.
        """
        ...

    @property
    def ratio(self) -> tuple[float, ...]:
        """Width ratios of the client classes; client i belongs to class i modulo their number."""
        ...

    def init(self, model: Model, seed: int, rounds: int) -> State:
        """The state before the first of `rounds` rounds."""
        ...

    def configure(
        self, model: Model, state: State, clients: Sequence[Client], training: Training
    ) -> Iterator[Task]:
        """The tasks of a round, one per client that takes part, made as they are asked for."""
        ...

    def local(self, model: Model, task: Task, memory: Memory) -> Fit:
        """What the client trains."""
        ...

    def report(self, model: Model, task: Task, fitted: Fitted, memory: Memory) -> Report:
        """What the client sends back, and what it keeps."""
        ...

    def aggregate(
        self, model: Model, state: State, clients: Sequence[Client], updates: Iterable[Update]
    ) -> State:
        """The next state, from the updates of those of `clients` that answered.

        Takes the updates one at a time, in any order; the result does not depend on the order.
        An update's tensors hold until the next one is asked for: what must last is cloned.
        With no update at all only the round advances.
        """
        ...

    def predictor(self, model: Model, state: State) -> Predictor:
        """How the state predicts."""
        ...


Report = tuple[Update, Memory]


class _Weighted(Protocol):
    @property
    def weighting(self) -> Weighting: ...


class _Scaled(Protocol):
    @property
    def width_scaling(self) -> WidthScaling: ...


# Hooks that many methods share. A method takes one as its own by `local = train_everything`.


def init_whole(self: object, model: Model, seed: int, rounds: int) -> State:
    """The global model, which no client needs to hold."""
    return State(params=model.init(seed), seed=seed, rounds=rounds)


def train_everything(self: object, model: Model, task: Task, memory: Memory) -> Fit:
    """Plain local training on cross-entropy, of all parameters or of those that the task names."""
    return Fit(params=task.params, training=task.training, trainable=task.trainable)


def train_scaled(self: _Scaled, model: Model, task: Task, memory: Memory) -> Fit:
    """Training of a cut model, whose layers make up for the inputs that they lack."""
    return Fit(params=task.params, training=task.training, width_scaling=self.width_scaling)


def report_deltas(self: object, model: Model, task: Task, fitted: Fitted, memory: Memory) -> Report:
    """The change of every trained parameter; with masked classes only the owners' output rows."""
    delta = subtract(fitted.params, task.params)
    submodel = task.submodel
    if task.training.mask_absent_classes:
        rows = _class_rows(model, submodel, delta, fitted.classes)
        submodel, delta = submodel.restrict(rows), dict(delta)
        for name, dims in rows.items():
            for dim, kept in dims.items():
                delta[name] = delta[name].index_select(dim, index_tensor(kept))
    update = Update(
        round=task.round,
        client=task.client.id,
        submodel=submodel,
        delta=delta,
        num_examples=fitted.num_examples,
        num_steps=fitted.num_steps,
        metrics=fitted.metrics,
    )
    return update, memory


def average_trained(
    self: _Weighted,
    model: Model,
    state: State,
    clients: Sequence[Client],
    updates: Iterable[Update],
) -> State:
    """Mean over those that trained an entry; the others keep their value (HeteroFL, Alg. 1)."""
    total = sum_of(state.params, clients, updates, self.weighting)
    return next_round(state, merge(state.params, total))


def predict_whole(self: object, model: Model, state: State) -> Predictor:
    """The whole global model."""
    return Predictor(model=model, params=state.params)


def sum_of(
    params: Params, clients: Sequence[Client], updates: Iterable[Update], weighting: Weighting
) -> ExactSum:
    """The exact weighted sum of a round's deltas."""
    weights = weights_of(clients, weighting)
    total = ExactSum(max_weight=max(1, sum(weights.values())))
    for update in updates:
        total.fold(update.submodel, update.delta, weights[update.client], params)
        del update  # its memory serves the next client
    return total


def weights_of(clients: Sequence[Client], weighting: Weighting) -> dict[int, int]:
    """Client -> its weight in the mean."""
    return {c.id: c.mixing * (c.num_examples if weighting == "examples" else 1) for c in clients}


def next_round(state: State, params: Params, **notes: object) -> State:
    """The state after a round."""
    return replace(state, params=params, round=state.round + 1, notes={**state.notes, **notes})


def _class_rows(
    model: Model, submodel: SubModel, names: Iterable[str], classes: Tensor
) -> dict[str, dict[int, Index]]:
    rows: dict[str, dict[int, Index]] = {}
    for name in names:
        ties = model.ties[submodel.views[name].name]
        dims = {d: classes for d, tie in enumerate(ties) if tie and tie.axis == CLASSES}
        if dims:
            rows[name] = dict(dims)
    return rows
