"""Malformed uploads: seeded changes of real encoded updates, byte by byte and part by part.

A change may leave an update well-formed (a flipped bit of a mantissa): who uses this asks the
server, and proves of what the server takes that it is what an honest client could have sent.
"""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tesserafl.core import seeds
from tesserafl.core.answers import check_update
from tesserafl.core.axis import LowRank, Tie, Width
from tesserafl.core.errors import MessageError, UpdateError
from tesserafl.core.fit import Training
from tesserafl.core.messages import Client, Task, Update
from tesserafl.core.method import State
from tesserafl.core.model import Model, Output
from tesserafl.core.wire import decode_update, encode_update
from tesserafl.data.examples import Examples, Spec
from tesserafl.engines.client import ClientWorker
from tesserafl.engines.compression import CompressionSettings
from tesserafl.methods import FedAsync, FedAvg, FedBRB, FedNova, HetLoRA, MethodSettings
from tesserafl.models import MLP

SPEC = Spec(kind="vector", task="vector-classification", shape=(6,), num_classes=3)
CLIENTS = [Client(id=number, num_examples=8 + number) for number in range(4)]
TRAINING = Training(lr=0.1, batch_size=4)


class Adapter(nn.Module):
    """x -> x (W + B A)^T with W frozen."""

    frozen: Tensor

    def __init__(self, rank: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("frozen", torch.eye(outputs, inputs), persistent=False)
        self.a = nn.Parameter(torch.randn(rank, inputs))
        self.b = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.frozen.T + inputs @ self.a.T @ self.b.T


class Adapters(nn.Module):
    def __init__(self, rank: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Adapter(rank, a, b) for a, b in pairwise(widths))

    def forward(self, inputs: Tensor) -> Output:
        for layer in self.layers:
            inputs = layer(inputs)
        return Output(inputs, None)


def adapters() -> Model:
    """Low-rank adapters of rank 4 on two frozen layers."""
    widths, rank = (6, 8, 3), Tie("rank", (1,))
    named = dict(Adapters(4, widths).named_parameters())
    return Model(
        build=lambda sizes: Adapters(sizes["rank"], widths),
        sizes={"rank": 4},
        widths={"rank": Width(4, 1, "rank")},
        depths={},
        ties={n: (rank, None) if n.endswith(".a") else (None, rank) for n in named},
        shapes={name: tuple(value.shape) for name, value in named.items()},
        low_rank=tuple(LowRank(f"layers.{i}.a", f"layers.{i}.b", 1.0) for i in (0, 1)),
    )


def examples_of(client: int) -> Examples:
    count = CLIENTS[client].num_examples
    draw = seeds.generator(0, client, "hostile")
    return Examples(inputs=torch.randn(count, 6, generator=draw), labels=torch.arange(count) % 3)


@dataclass(kw_only=True)
class Case:
    """A task as a server holds it, and what an honest client answers."""

    name: str
    method: MethodSettings
    model: Model
    deltas: str = "none"

    @cached_property
    def state(self) -> State:
        return self.method.init(self.model, 0, 8)

    @cached_property
    def tasks(self) -> list[Task]:
        return list(self.method.configure(self.model, self.state, CLIENTS, TRAINING))

    @property
    def task(self) -> Task:
        return self.tasks[1]

    @cached_property
    def answers(self) -> list[bytes]:
        """Of all clients: the first four of this round, then of another one."""
        worker = ClientWorker(
            model=self.model,
            method=self.method,
            examples=examples_of,
            seed=0,
            compression=CompressionSettings(deltas=self.deltas, share=0.3),  # type: ignore[arg-type]
        )
        later = State(params=self.state.params, seed=0, rounds=8, round=3, notes=self.state.notes)
        others = list(self.method.configure(self.model, later, CLIENTS, TRAINING))
        tasks = [*self.tasks, *others]
        return [encode_update(worker.work(task, {})[0], {}) for task in tasks]

    @property
    def honest(self) -> bytes:
        return self.answers[1]

    def receive(self, data: bytes) -> Update:
        """What a server does with an upload; raises MessageError or UpdateError."""
        update, _ = decode_update(data, self.task)
        check_update(self.task, update, self.state.params, self.model)
        return update


def cases() -> list[Case]:
    """Whole models, parts of them, low-rank factors; as they are and compressed."""
    mlp = MLP(hidden=(8, 12)).build_model(SPEC)
    return [
        Case(name="fedavg", method=FedAvg(), model=mlp),
        Case(name="fedavg int8", method=FedAvg(), model=mlp, deltas="int8"),
        Case(name="fedbrb", method=FedBRB(ratio=(0.25,)), model=mlp),
        Case(name="fedbrb topk", method=FedBRB(ratio=(0.25,)), model=mlp, deltas="topk"),
        Case(name="fednova bfloat16", method=FedNova(), model=mlp, deltas="bfloat16"),
        Case(name="fedasync", method=FedAsync(ratio=(0.5,)), model=mlp),
        Case(name="hetlora", method=HetLoRA(ratio=(1.0, 0.75), decay=0.5), model=adapters()),
    ]


def must_be_honest(case: Case, update: Update) -> None:
    """Asserts, without the code under test, that an honest client could have sent the update."""
    task, wanted = case.task, case.task.wanted
    assert (update.round, update.client) == (task.round, task.client.id)
    assert 0 <= update.num_examples <= task.client.num_examples
    assert 0 <= update.num_steps <= 16
    assert all(abs(value) <= 2.0**53 for value in update.metrics.values())
    names = set(task.submodel.views) if wanted.deltas is None else wanted.deltas
    assert set(update.delta) == names and set(update.extra) == set(wanted.extra)
    for name, tensor in [*update.delta.items(), *update.extra.items()]:
        sent = task.params[name]
        assert tensor.dtype == sent.dtype and tensor.dim() == sent.dim()
        assert all(n <= m for n, m in zip(tensor.shape, sent.shape, strict=True))
        assert wanted.fewer or tensor.shape == sent.shape
        assert bool(torch.isfinite(tensor).all()) and float(tensor.abs().max()) <= 256.0
    after = case.method.aggregate(case.model, case.state, CLIENTS, iter([update]))
    for name, tensor in after.params.items():
        assert tensor.shape == case.state.params[name].shape
        assert bool(torch.isfinite(tensor).all())


@dataclass
class Message:
    """A safetensors buffer taken apart, so that every part can be told wrongly."""

    entries: dict[str, dict[str, Any]]
    body: dict[str, Any]
    blob: bytes
    repeated: list[tuple[str, Any]] = field(default_factory=list)
    """Keys that the header has twice."""

    @classmethod
    def of(cls, data: bytes) -> Message:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        body = json.loads(header.pop("__metadata__")["tessera"])
        return cls(header, body, data[8 + length :])

    def bytes(self) -> bytes:
        metadata = {"__metadata__": {"tessera": json.dumps(self.body)}}
        text = json.dumps({**metadata, **self.entries})
        if self.repeated:
            more = "".join(f", {json.dumps(k)}: {json.dumps(v)}" for k, v in self.repeated)
            text = text[:-1] + more + "}"
        raw = text.encode()
        raw += b" " * (-len(raw) % 8)
        return len(raw).to_bytes(8, "little") + raw + self.blob

    def put(self, name: str, dtype: str, shape: list[int], raw: bytes) -> None:
        """Set a tensor, all others in their places; the group lists it."""
        chunks = {n: (e, self.raw(n)) for n, e in self.entries.items()}
        chunks[name] = ({"dtype": dtype, "shape": shape}, raw)
        self.entries, self.blob = {}, b""
        for n, (entry, chunk) in chunks.items():
            place = [len(self.blob), len(self.blob) + len(chunk)]
            self.entries[n] = {**entry, "data_offsets": place}
            self.blob += chunk
        group, _, small = name.partition("/")
        listed = self.body["groups"].setdefault(group, [])
        if small not in listed:
            listed.append(small)

    def drop(self, name: str) -> None:
        chunks = {n: (e, self.raw(n)) for n, e in self.entries.items() if n != name}
        group, _, small = name.partition("/")
        self.body["groups"][group].remove(small)
        self.entries, self.blob = {}, b""
        for n, (entry, chunk) in chunks.items():
            self.put(n, entry["dtype"], entry["shape"], chunk)

    def raw(self, name: str) -> bytes:
        first, end = self.entries[name]["data_offsets"]
        return self.blob[first:end]


Change = Callable[[random.Random, Case], bytes]


def changes() -> dict[str, Change]:
    """Kinds of changes, by name; each draws from what it is given alone."""
    return {**BYTES, **{name: _rebuilt(change) for name, change in PARTS.items()}, **REPLAYS}


def _rebuilt(change: Callable[[random.Random, Message], None]) -> Change:
    def made(draw: random.Random, case: Case) -> bytes:
        message = copy.deepcopy(Message.of(case.honest))
        change(draw, message)
        return message.bytes()

    return made


# --- Bytes ----------------------------------------------------------------------------------------


def _truncated(draw: random.Random, case: Case) -> bytes:
    return case.honest[: draw.randrange(len(case.honest))]


def _flipped(draw: random.Random, case: Case) -> bytes:
    data = bytearray(case.honest)
    for _ in range(draw.randint(1, 8)):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


def _overwritten(draw: random.Random, case: Case) -> bytes:
    data, count = bytearray(case.honest), draw.randint(1, 64)
    first = draw.randrange(len(data))
    data[first : first + count] = draw.choice([bytes(count), draw.randbytes(count)])
    return bytes(data)


def _inserted(draw: random.Random, case: Case) -> bytes:
    place, more = draw.randrange(len(case.honest)), draw.randbytes(draw.randint(1, 16))
    return case.honest[:place] + more + case.honest[place:]


def _cut_out(draw: random.Random, case: Case) -> bytes:
    first = draw.randrange(len(case.honest))
    return case.honest[:first] + case.honest[first + draw.randint(1, 64) :]


def _spliced(draw: random.Random, case: Case) -> bytes:
    other = draw.choice(case.answers)
    return case.honest[: draw.randrange(len(case.honest))] + other[draw.randrange(len(other)) :]


def _length_lies(draw: random.Random, case: Case) -> bytes:
    length = int.from_bytes(case.honest[:8], "little")
    lie = draw.choice(
        [
            0,
            1,
            length - 8,
            length + 8,
            len(case.honest),
            1 << 31,
            (1 << 63) - 1,
            draw.getrandbits(64),
        ]
    )
    return max(0, lie).to_bytes(8, "little") + case.honest[8:]


def _hostile_header(draw: random.Random, case: Case) -> bytes:
    count = draw.choice([10, 1000, 100_000])
    header = draw.choice(
        [
            b"[" * count,
            b'{"a":' * count,
            b"[" + b"1" * count + b"]",
            b'{"__metadata__":{"tessera":' + b'"' + b"[" * count + b'"}}',
            json.dumps({"__metadata__": {"tessera": "9" * count}}).encode(),
            json.dumps({"__metadata__": {"tessera": '{"groups":{"delta":["a"]}}'}}).encode(
                "utf-16"
            ),
            b"\xff\xfe" + b"{}" * count,
            b'{"a":{},' * count,
            b"NaN",
            b"",
        ]
    )
    return len(header).to_bytes(8, "little") + header + case.honest[-64:]


BYTES: dict[str, Change] = {
    "truncated": _truncated,
    "bits flipped": _flipped,
    "bytes overwritten": _overwritten,
    "bytes inserted": _inserted,
    "bytes cut out": _cut_out,
    "spliced": _spliced,
    "header length": _length_lies,
    "hostile header": _hostile_header,
}

# --- Whole messages of somebody or sometime else --------------------------------------------------

REPLAYS: dict[str, Change] = {
    "another client's": lambda draw, case: case.answers[draw.choice([0, 2, 3])],
    "another round's": lambda draw, case: case.answers[5],
    "another's part as one's own": lambda draw, case: _as_own(draw, case),
}


def _as_own(draw: random.Random, case: Case) -> bytes:
    """The update of another client's, or another round's, part under one's own name."""
    message = Message.of(case.answers[draw.choice([0, 2, 3, 4, 5, 6, 7])])
    message.body |= {"client": case.task.client.id, "round": case.task.round}
    return message.bytes()


# --- Parts ----------------------------------------------------------------------------------------

HUGE = (1 << 62, 1 << 63, 1 << 70, 10**30, -1, -(1 << 63))
NAMES = (
    "../../../../etc/passwd",
    "..\\..\\boot.ini",
    "/etc/shadow",
    "delta/../memory",
    "a\0b",
    "\ud800",
    "",
    "x" * 5000,
    "__metadata__",
    "__class__",
    "\u202e\n\x1b[2J",
)


def _tensor(draw: random.Random, message: Message) -> str:
    return draw.choice(sorted(message.entries))


def _offsets(draw: random.Random, message: Message) -> None:
    entry, other = (message.entries[_tensor(draw, message)] for _ in range(2))
    first, end = entry["data_offsets"]
    entry["data_offsets"] = draw.choice(
        [
            list(other["data_offsets"]),
            [first, end + 4],
            [first + 4, end],
            [end, first],
            [first, draw.choice(HUGE)],
            [draw.choice(HUGE), end],
            [0, len(message.blob)],
            [first],
            [str(first), end],
            [first + 0.5, end],
        ]
    )


def _dtype(draw: random.Random, message: Message) -> None:
    kinds = ["F64", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "F4", "C64", "X", 3]
    message.entries[_tensor(draw, message)]["dtype"] = draw.choice(kinds)


def _other_dtype(draw: random.Random, message: Message) -> None:
    """The same number of entries, of another type, in bytes that are all there."""
    name = _tensor(draw, message)
    entry = message.entries[name]
    count = len(message.raw(name)) // {"F32": 4, "I8": 1, "BF16": 2, "I32": 4}[entry["dtype"]]
    sizes = {"F64": 8, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "BOOL": 1, "F8_E4M3": 1}
    dtype = draw.choice(sorted(sizes.keys() - {entry["dtype"]}))
    message.put(name, dtype, entry["shape"], bytes(count * sizes[dtype]))


def _shape(draw: random.Random, message: Message) -> None:
    entry = message.entries[_tensor(draw, message)]
    shape = list(entry["shape"])
    entry["shape"] = draw.choice(
        [
            shape[::-1],
            [*shape, 1],
            [1, *shape],
            shape[1:],
            [],
            [0, *shape],
            [draw.choice(HUGE)],
            [0, 1 << 62],
            [1 << 40, 0, 1 << 40],
            [1 << 32, 1 << 32],
            [-1],
            "4",
            [[4]],
            [1] * 1000,
        ]
    )


def _other_shape(draw: random.Random, message: Message) -> None:
    """More or fewer entries than wanted, in bytes that are all there."""
    name = _tensor(draw, message)
    entry = message.entries[name]
    size = {"F32": 4, "I8": 1, "BF16": 2, "I32": 4}[entry["dtype"]]
    shape = [max(0, n + draw.choice([-1, 0, 1, 5])) for n in entry["shape"]]
    count = 1
    for n in shape:
        count *= n
    message.put(name, entry["dtype"], shape, bytes(count * size))


def _renamed(draw: random.Random, message: Message) -> None:
    name, new = _tensor(draw, message), draw.choice(NAMES)
    group, _, small = name.partition("/")
    raw, entry = message.raw(name), message.entries[name]
    message.drop(name)
    message.put(f"{group}/{new}", entry["dtype"], entry["shape"], raw)
    views = message.body["submodel"]["views"]
    if small in views and draw.random() < 0.5:
        views[new] = views.pop(small)


def _more_tensors(draw: random.Random, message: Message) -> None:
    group = draw.choice(["delta", "extra", "codes", "memory", "params", ""])
    raw = struct.pack("<2f", 1.0, 2.0)
    message.put(f"{group}/{draw.choice(['w', 'layers.0.weight', *NAMES])}", "F32", [2], raw)


def _fewer_tensors(draw: random.Random, message: Message) -> None:
    message.drop(_tensor(draw, message))


def _listed(draw: random.Random, message: Message) -> None:
    groups = message.body["groups"]
    group = draw.choice(sorted(groups))
    wrong: list[Callable[[], None]] = [
        lambda: groups[group].append("never sent"),
        lambda: groups[group].extend(groups[group]),
        lambda: groups.update({group: "delta"}),
        lambda: groups.update({group: None}),
        lambda: groups.update({group: {"a": 1}}),
        lambda: groups.pop(group),
        lambda: message.body.update(groups=[]),
        lambda: groups.update({group: [draw.choice([1, None, [], {}, 1.5])]}),
    ]
    draw.choice(wrong)()


def _repeated(draw: random.Random, message: Message) -> None:
    name = _tensor(draw, message)
    message.repeated = [
        draw.choice(
            [
                (name, message.entries[name]),
                (name, {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),
                ("__metadata__", {"tessera": "{}"}),
            ]
        )
    ]


def _number(draw: random.Random, message: Message) -> None:
    name = draw.choice(["round", "client", "num_examples", "num_steps"])
    old = message.body[name]
    message.body[name] = draw.choice(
        [*HUGE, old + 1, old + 1000, float(old), str(old), None, True, [old], float("nan"), 1e400]
    )


def _metrics(draw: random.Random, message: Message) -> None:
    metrics = message.body["metrics"]
    name = draw.choice([*metrics, "validation_examples", "trained_entries", "client", "pieces"])
    wrong: list[Callable[[], None]] = [
        lambda: metrics.update({name: draw.choice([float("nan"), float("inf"), -float("inf")])}),
        lambda: metrics.update({name: draw.choice([1e300, -1e300, 1e17, -1.0, -0.5, 0.0])}),
        lambda: metrics.update({name: draw.choice(["1", None, [], {}, True, 10**400])}),
        lambda: metrics.update({f"m{n}": 1.0 for n in range(draw.choice([100, 1000]))}),
        lambda: metrics.update({draw.choice(NAMES): 1.0}),
        lambda: metrics.clear(),
        lambda: message.body.update(metrics=draw.choice([[], None, 3, {"a": {"b": {}}}])),
    ]
    draw.choice(wrong)()


def _view(draw: random.Random, message: Message) -> None:
    submodel = message.body["submodel"]
    views = submodel["views"]
    name = draw.choice(sorted(views))
    other = draw.choice(sorted(views))
    dims = views[name][1]
    dim = draw.randrange(len(dims))
    entry = dims[dim]

    def moved(by: int) -> None:
        if isinstance(entry, list):
            dims[dim] = [entry[0] + by, entry[1] + by]
        else:
            submodel["lists"][entry] = [max(0, n + by) for n in submodel["lists"][entry]]

    wrong: list[Callable[[], None]] = [
        lambda: moved(draw.choice([1, 2, 7, 1000, 1 << 40])),
        lambda: dims.__setitem__(dim, draw.choice([[0, 1 << 61], [0, 0], [1 << 61, 1 << 61]])),
        lambda: dims.__setitem__(dim, draw.choice([[3, 1], [-1, 2], [1], [1, 2, 3], 10**6, "0"])),
        lambda: dims.extend([entry] * draw.choice([1, 2, 500])),
        lambda: dims.pop(),
        lambda: views.update({name: [views[other][0], dims]}),
        lambda: views.update({name: [draw.choice(NAMES), dims]}),
        lambda: views.update({name: views[other]}),
        lambda: views.pop(name),
        lambda: views.clear(),
        lambda: views.update({draw.choice(NAMES): views[name]}),
        lambda: views.update({f"v{n}": views[name] for n in range(200)}),
        lambda: submodel["sizes"].update(
            {draw.choice([*submodel["sizes"], "depth"]): draw.choice([0, 1, 99, 1 << 61])}
        ),
        lambda: submodel.update(draw.choice([{"views": []}, {"lists": 3}, {"sizes": None}])),
    ]
    draw.choice(wrong)()


def _lists(draw: random.Random, message: Message) -> None:
    """Index lists that are long, repeat themselves, or are not lists of places at all."""
    submodel = message.body["submodel"]
    lists, views = submodel["lists"], submodel["views"]
    count = draw.choice([2, 10, 1000, 20_000])
    lists.append(
        draw.choice(
            [
                [0] * count,
                list(range(count)),
                [(1 << 61) + n for n in range(min(count, 1000))],
                [-1] * count,
                ["0"] * count,
                [1.5],
                [],
                [[0]] * count,
                [1 << 70],
            ]
        )
    )
    for name in draw.sample(sorted(views), draw.randint(1, len(views))):
        dims = views[name][1]
        dims[draw.randrange(len(dims))] = len(lists) - 1


def _fewer_rows(draw: random.Random, message: Message) -> None:
    """Some rows of what was sent; of low-rank factors at times the same of both."""
    submodel = message.body["submodel"]
    deltas = [name for name in message.entries if name.startswith("delta/")]
    pairs = [n for n in deltas if n.endswith(".a")] if draw.random() < 0.7 else []
    for name in pairs or [draw.choice(deltas or sorted(message.entries))]:
        small = name.partition("/")[2]
        if small not in submodel["views"]:
            return
        _keep_first(message, name, 0, 2)
        partner = name.removesuffix(".a") + ".b"
        if pairs and partner in message.entries and draw.random() < 0.8:
            _keep_first(message, partner, 1, 2)


def _keep_first(message: Message, name: str, dim: int, count: int) -> None:
    entry, small = message.entries[name], name.partition("/")[2]
    if entry["dtype"] != "F32" or len(entry["shape"]) <= dim:
        return
    whole = torch.frombuffer(bytearray(message.raw(name)), dtype=torch.float32)
    if whole.numel() != torch.Size(entry["shape"]).numel():
        return
    part = whole.reshape(entry["shape"]).narrow(dim, 0, min(count, entry["shape"][dim]))
    part = part.contiguous()
    message.put(name, "F32", list(part.shape), part.numpy().tobytes())
    dims = message.body["submodel"]["views"][small][1]
    if isinstance(dims[dim], list):
        dims[dim] = [dims[dim][0], dims[dim][0] + part.shape[dim]]
    else:
        message.body["submodel"]["lists"].append(
            message.body["submodel"]["lists"][dims[dim]][: part.shape[dim]]
        )
        dims[dim] = len(message.body["submodel"]["lists"]) - 1


def _values(draw: random.Random, message: Message) -> None:
    name = _tensor(draw, message)
    entry, raw = message.entries[name], bytearray(message.raw(name))
    if entry["dtype"] == "F32":
        nonsense = [float("nan"), float("inf"), -float("inf"), 256.5, -1e30, 3e38, 1e-42, 255.0]
        struct.pack_into("<f", raw, 4 * draw.randrange(len(raw) // 4), draw.choice(nonsense))
    elif entry["dtype"] == "BF16":
        struct.pack_into(
            "<H", raw, 2 * draw.randrange(len(raw) // 2), draw.choice([0x7FC0, 0x7F80, 0x43FF, 1])
        )
    elif entry["dtype"] == "I32":
        wrong = draw.choice([-1, 0, 1, 1 << 20, (1 << 31) - 1, -(1 << 31)])
        struct.pack_into("<i", raw, 4 * draw.randrange(len(raw) // 4), wrong)
    else:
        raw[draw.randrange(len(raw))] = draw.choice([0x80, 0x7F, 0])
    message.put(name, entry["dtype"], entry["shape"], bytes(raw))


def _coded(draw: random.Random, message: Message) -> None:
    coded = message.body.get("coded")
    names = sorted(message.body["submodel"]["views"])
    if coded is None:
        coding = draw.choice(["int8", "topk", "bfloat16", "gzip"])
        message.body["coded"] = {"coding": coding, "names": draw.choice([names, [], ["w"]])}
        if draw.random() < 0.5:
            message.body["groups"]["codes"] = []
        return
    wrong: list[Callable[[], None]] = [
        lambda: coded.update(coding=draw.choice(["int8", "topk", "bfloat16", "gzip", "", None])),
        lambda: coded.update(names=draw.choice([names[1:], [], [*names, "w"], None, "all"])),
        lambda: message.body.pop("coded"),
        lambda: message.body["groups"].pop("codes", None),
        lambda: message.body.update(coded=draw.choice([[], 1, {}, "int8"])),
    ]
    draw.choice(wrong)()


def _anywhere(draw: random.Random, message: Message) -> None:
    """Some value of the JSON, at any depth, becomes another."""
    new = draw.choice([None, True, 0, -1, 1.5, "x", [], {}, [[]], 10**25, float("inf")])

    def replaced(value: Any) -> Any:
        if isinstance(value, dict) and value and draw.random() < 0.8:
            key = draw.choice(sorted(value))
            return {**value, key: replaced(value[key])}
        if isinstance(value, list) and value and draw.random() < 0.8:
            place = draw.randrange(len(value))
            return [*value[:place], replaced(value[place]), *value[place + 1 :]]
        return new

    key = draw.choice(sorted(message.body))
    message.body[key] = replaced(message.body[key])


PARTS: dict[str, Callable[[random.Random, Message], None]] = {
    "offsets": _offsets,
    "type named": _dtype,
    "type sent": _other_dtype,
    "shape named": _shape,
    "shape sent": _other_shape,
    "names": _renamed,
    "tensors never asked for": _more_tensors,
    "tensors missing": _fewer_tensors,
    "groups": _listed,
    "keys twice": _repeated,
    "round, client, counts": _number,
    "metrics": _metrics,
    "views": _view,
    "index lists": _lists,
    "fewer rows": _fewer_rows,
    "values": _values,
    "coding": _coded,
    "JSON anywhere": _anywhere,
}

REFUSED = (MessageError, UpdateError)
