"""What a run would cost, before it runs: no training, no memory for activations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rich.table import Table

from tesserafl.core.coverage import Coverage
from tesserafl.core.messages import Task
from tesserafl.core.method import State
from tesserafl.core.params import num_bytes, num_entries
from tesserafl.core.submodel import SubModel
from tesserafl.engines.compression import answer_bytes, task_bytes
from tesserafl.models.costs import frozen_entries
from tesserafl.run.classes import classes_of
from tesserafl.run.costs import CostTable
from tesserafl.run.federate import topology_of
from tesserafl.run.first import first_state
from tesserafl.run.peering import Peering, peering_of
from tesserafl.run.peering import described as peering_described
from tesserafl.run.setup import Setup


@dataclass(frozen=True, kw_only=True)
class PlannedClass:
    """What the clients of one ratio or depth (and one memory size) would hold and do."""

    ratio: float
    depth: int | None
    """Blocks that they train, of methods that leave out blocks; None: of any other."""
    num_clients: int
    num_entries: int
    """Parameters that a client holds."""
    share: float
    """Of the global model's parameters."""
    bytes_down: int
    """Of a task as it is sent."""
    bytes_up: int
    """Of its answer."""
    flops_per_step: float
    """Of one optimiser step on a full batch."""
    activation_bytes: int
    peak_bytes: int
    num_trained: int
    """Of the parameters that a client holds."""
    memory_bytes: int | None
    """What the clients have; None: no limit."""

    @property
    def fits(self) -> bool:
        """Whether the predicted peak is within the clients' memory."""
        return self.memory_bytes is None or self.peak_bytes <= self.memory_bytes


@dataclass(frozen=True, kw_only=True)
class PlannedEdge:
    """What goes over an edge's link in a round of the cloud, if its devices are of all classes."""

    bytes_down: int
    """Of the model."""
    bytes_up_once: int | None
    """Where it averages once: of its devices' sum, in integers. None: it hands on each device's
    update, for a method that looks at them one by one."""
    bytes_up_several: int | None
    """Where it averages more often: of its model. None: the method has nothing for that."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The classes of clients and how the coverage grows."""

    num_entries: int
    """Parameters of the global model."""
    frozen: int
    """Numbers of the frozen model under adapters; 0: there is none."""
    axes: dict[str, int]
    """Axis -> units (or blocks)."""
    classes: tuple[PlannedClass, ...]
    coverage: dict[int, float]
    """Rounds -> share of the global model's entries that were trained at least once."""
    peering: Peering | None
    """What peers store and send; None: a server and its clients."""
    edge: PlannedEdge | None
    """What an edge of a tree sends and receives; None: there are none."""


def make_plan(setup: Setup, coverage_rounds: Sequence[int] = (1, 2, 5, 10, 20, 50, 100)) -> Plan:
    """Plan an experiment; `coverage_rounds` beyond its rounds are left out.

    Raises:
        ConfigError: the experiment cannot be run.
    """
    experiment, model = setup.experiment, setup.model
    experiment.compression.check(experiment.method, topology_of(experiment))
    state = first_state(experiment, model, setup.data)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.params.items()}
    entries = num_entries(state.params)
    costs = setup.costs()
    peering = None
    if topology_of(experiment) == "peers":
        peering = peering_of(setup, state, costs)
    # On `meta` a cut costs nothing: only who gets which part is wanted.
    state = replace(state, params={n: t.to("meta") for n, t in state.params.items()})
    wanted = sorted({r for r in coverage_rounds if r < experiment.rounds} | {experiment.rounds})
    return Plan(
        num_entries=entries,
        frozen=frozen_entries(model),
        axes={axis: model.units(axis) for axis in (*model.widths, *model.depths)},
        classes=tuple(_classes(setup, state, entries, costs)),
        coverage=_coverage(setup, state, Coverage(shapes), wanted),
        peering=peering,
        edge=_edge(setup, state) if topology_of(experiment) == "tree" else None,
    )


def _edge(setup: Setup, state: State) -> PlannedEdge:
    method, reported = setup.experiment.method, set[str]()
    for kind in classes_of(setup.experiment, setup.model, setup.clients, state):
        wanted = kind.task.wanted.deltas
        views = _trained(kind.task).views
        reported |= {v.name for n, v in views.items() if wanted is None or n in wanted}
    size = num_bytes(state.params)
    # Integers of 8 bytes; a parameter of which somebody reports a part is summed as a whole.
    sums = sum(8 * state.params[name].numel() for name in reported)
    several = method.entrywise or hasattr(method, "relayed")
    return PlannedEdge(
        bytes_down=size,
        bytes_up_once=sums if method.entrywise else None,
        bytes_up_several=size if several else None,
    )


def _classes(setup: Setup, state: State, whole: int, costs: CostTable) -> list[PlannedClass]:
    experiment, classes = setup.experiment, []
    for kind in classes_of(experiment, setup.model, setup.clients, state):
        cost = costs.of(kind.task)
        classes.append(
            PlannedClass(
                ratio=kind.ratio,
                depth=kind.depth,
                num_clients=len(kind.members),
                num_entries=cost.num_entries,
                share=cost.num_entries / whole,
                bytes_down=task_bytes(kind.task, experiment.compression),
                bytes_up=answer_bytes(kind.task, experiment.compression),
                flops_per_step=cost.flops_per_example * experiment.training.batch_size,
                activation_bytes=cost.activation_bytes,
                peak_bytes=cost.peak_bytes,
                num_trained=cost.num_trained,
                memory_bytes=kind.memory_bytes,
            )
        )
    return classes


def _coverage(
    setup: Setup, state: State, coverage: Coverage, wanted: Sequence[int]
) -> dict[int, float]:
    experiment, shares = setup.experiment, {}
    for number in range(1, wanted[-1] + 1):
        cohort = setup.cohort(state.round)
        tasks = experiment.method.configure(setup.model, state, cohort, experiment.training)
        coverage.add([_trained(t) for t in tasks if setup.answers(state.round, t.client)])
        state = experiment.method.aggregate(setup.model, state, cohort, iter(()))
        if number in wanted:
            shares[number] = coverage.share
        if coverage.share == 1.0:
            shares |= {r: 1.0 for r in wanted if r >= number}
            break
    return shares


def _trained(task: Task) -> SubModel:
    """The part of what a client holds that it trains."""
    part = task.submodel
    if task.trainable is None:
        return part
    return SubModel(part.sizes, {n: v for n, v in part.views.items() if n in task.trainable})


def described(plan: Plan) -> Iterator[str | Table]:
    """The plan for a terminal."""
    axes = ", ".join(f"{axis} {units}" for axis, units in plan.axes.items())
    yield f"Global model: {plan.num_entries:,} parameters; units per axis: {axes}"
    if plan.frozen:
        most = max((kind.num_trained for kind in plan.classes), default=0)
        yield (
            f"Under them {plan.frozen:,} frozen numbers; at first a client trains at most "
            f"{most:,}, that is {most / plan.frozen:.3%}"
        )
    both = all(kind.bytes_up == kind.bytes_down for kind in plan.classes)
    sizes = ("MB each way",) if both else ("MB down", "MB up")
    table = Table("ratio", "clients", "parameters", "share", *sizes, "MFLOP a step")
    for column in ("peak MiB", "has MiB", "fits"):
        table.add_column(column)
    for kind in plan.classes:
        memory = "-" if kind.memory_bytes is None else f"{kind.memory_bytes / 2**20:.2f}"
        table.add_row(
            f"{kind.ratio:g}" if kind.depth is None else f"{kind.depth} deep",
            str(kind.num_clients),
            f"{kind.num_entries:,}",
            f"{kind.share:.1%}",
            f"{kind.bytes_down / 1e6:.3g}",
            *([] if both else [f"{kind.bytes_up / 1e6:.3g}"]),
            f"{kind.flops_per_step / 1e6:.3g}",
            f"{kind.peak_bytes / 2**20:.2f}",
            memory,
            "yes" if kind.fits else "NO",
        )
    yield table
    grown = ", ".join(f"{share:.1%} after {rounds}" for rounds, share in plan.coverage.items())
    yield f"Coverage of the global model by round: {grown}"
    if plan.edge is not None:
        edge = plan.edge
        once = "every update of its devices"
        if edge.bytes_up_once is not None:
            once = f"{edge.bytes_up_once / 1e6:.3g} MB up"
        more = "it can average once only"
        if edge.bytes_up_several is not None:
            more = f"{edge.bytes_up_several / 1e6:.3g} MB up if more often"
        yield (
            f"The link of an edge, in a round of the cloud: {edge.bytes_down / 1e6:.3g} MB down; "
            f"{once} if it averages once, {more}"
        )
    if plan.peering is not None:
        yield from peering_described(plan.peering, plan.num_entries)
