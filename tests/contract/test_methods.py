"""Laws that every method keeps. A new method joins by one line in CUT and one in WHOLE.

Methods of low-rank adapters refuse other models: they keep the laws on the family `adapted`.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from torch import Tensor, nn

from tesserafl.core import seeds
from tesserafl.core.answers import check_update
from tesserafl.core.axis import Depth, LowRank, Tie, Width
from tesserafl.core.checks import check_delta
from tesserafl.core.coverage import Coverage
from tesserafl.core.errors import ConfigError, UpdateError
from tesserafl.core.fit import Training
from tesserafl.core.messages import Client, Memory, Task, Update
from tesserafl.core.method import State, Weighting, average_trained
from tesserafl.core.model import Model, Output, Sizes
from tesserafl.core.params import Params, sha256
from tesserafl.core.stored import Stored
from tesserafl.core.submodel import cut, index_tensor
from tesserafl.core.wire import decode_update, encode_update, task_of, task_parts
from tesserafl.data.examples import Examples, Spec
from tesserafl.engines.client import ClientWorker, execute
from tesserafl.engines.incoming import Later, read_letter
from tesserafl.engines.parcels import Outgoing, letter_of
from tesserafl.methods import (
    DPSGD,
    FLM,
    METHODS,
    DepthFL,
    EqualFinish,
    FedAdapter,
    FedAsync,
    FedAvg,
    FedBRB,
    FedBuff,
    FedEcover,
    FederatedDropout,
    FedFMSL,
    FedIT,
    FedNova,
    FedRolex,
    FedSALoRA,
    FFALoRA,
    FlexLoRA,
    FLoRA,
    HeteroFL,
    HetLoRA,
    HierFAVG,
    Hwamei,
    Local,
    MatchedAveraging,
    MethodSettings,
    MSfusion,
    PFLMoE,
    Progressive,
    RandomDepth,
    Ravan,
    Tomtit,
)
from tesserafl.methods._width import kept_units
from tesserafl.models import CNN, MLP, Residual
from tesserafl.models.scaling import forward_of
from tesserafl.run import checkpoint

RATIO = (0.5, 0.25)
"""Every axis of the models below divides into 4."""
DEPTH = (2, 1)
"""Of 3 blocks."""

CUT: dict[str, MethodSettings] = {
    "fedavg": FedAvg(ratio=RATIO),
    "heterofl": HeteroFL(ratio=RATIO),
    "federated_dropout": FederatedDropout(ratio=RATIO),
    "fedrolex": FedRolex(ratio=RATIO),
    "fedecover": FedEcover(ratio=RATIO),
    "fedbrb": FedBRB(ratio=RATIO),
    "msfusion": MSfusion(ratio=RATIO, contrast=0.5),
    "dpsgd": DPSGD(ratio=RATIO),
    "fedit": FedIT(ratio=RATIO),
    "ffa_lora": FFALoRA(ratio=RATIO),
    "flexlora": FlexLoRA(ratio=RATIO),
    "hetlora": HetLoRA(ratio=RATIO),
    "fedsa_lora": FedSALoRA(ratio=RATIO),
    "flora": FLoRA(ratio=RATIO),
    "ravan": Ravan(ratio=RATIO, heads=2),
    "fedfmsl": FedFMSL(ratio=RATIO, start=1, step=1, patience=2, tolerance=1.0),
    "pfl_moe": PFLMoE(ratio=RATIO),
    "fedadapter": FedAdapter(ratio=RATIO, start_width=2, width_step=2, window=2),
    "random_depth": RandomDepth(depth=DEPTH),
    "depthfl": DepthFL(depth=DEPTH),
    "progressive": Progressive(depth=DEPTH),
    "flm": FLM(depth=DEPTH, warmup=1, cooldown=1, support=0.0, policy="persistent"),
    "local": Local(ratio=RATIO),
    "matched_averaging": MatchedAveraging(ratio=RATIO),
    "hierfavg": HierFAVG(ratio=RATIO),
    "equal_finish": EqualFinish(ratio=RATIO),
    "fednova": FedNova(ratio=RATIO),
    "fedbuff": FedBuff(ratio=RATIO),
    "fedasync": FedAsync(ratio=RATIO),
    "tomtit": Tomtit(ratio=RATIO),
    "hwamei": Hwamei(ratio=RATIO),
    # Further settings of the same methods.
    "hierfavg normalised": HierFAVG(ratio=RATIO, normalised=True, weighting="uniform"),
    "fedbuff by examples": FedBuff(ratio=RATIO, weighting="examples", server_lr=0.5),
    "fedasync by examples": FedAsync(ratio=RATIO, weighting="examples", staleness="hinge"),
    "matched_averaging from own starts": MatchedAveraging(
        ratio=RATIO, start="own", weighting="uniform"
    ),
    "heterofl by examples, unscaled": HeteroFL(
        ratio=RATIO, weighting="examples", width_scaling="none"
    ),
    "fedecover decaying": FedEcover(ratio=RATIO, step=0.5, step_decay=0.5),
    "fedbrb diagonal": FedBRB(ratio=RATIO, rolling="diagonal", init_blocks="independent"),
    "fedbrb glued": FedBRB(ratio=RATIO, rolling="independent", anneal="cosine"),
    "fedbrb similar": FedBRB(ratio=RATIO, broadcast_weight="similarity", width_scaling="output"),
    "fedbrb of updates": FedBRB(ratio=RATIO, broadcast_of="updates"),
    "msfusion staggered": MSfusion(ratio=RATIO, layer_phase="staggered", contrast=0.0),
    "msfusion adaptive": MSfusion(
        ratio=RATIO, overlap_schedule="adaptive", momentum="carry", weighting="uniform"
    ),
    "msfusion against all": MSfusion(ratio=RATIO, contrast=1.0, negatives="both"),
    "msfusion against peers": MSfusion(
        ratio=RATIO, negatives="peers", peer_negatives=1, width_scaling="parameters"
    ),
    "dpsgd by examples": DPSGD(ratio=RATIO, weighting="examples"),
    "hetlora pruning": HetLoRA(ratio=RATIO, decay=0.5, penalty=5.0, weighting="uniform"),
    "ravan by size": Ravan(ratio=RATIO, choice="largest", weighting="uniform"),
    "fedfmsl in stage two": FedFMSL(
        ratio=RATIO, stage_one=0.0, schedule="manual", depths=(1, 2), balance=0.0
    ),
    "fedfmsl alone": FedFMSL(
        ratio=RATIO,
        stage_one=0.0,
        start=1,
        patience=3,
        tolerance=1.0,
        gate="private",
        own_start="pretrained",
    ),
    "fedfmsl from the input": FedFMSL(
        ratio=RATIO,
        schedule="linear",
        start=1,
        ramp=2,
        window=1,
        order="input",
        caps=(2, 1),
        weighting="uniform",
    ),
    "fedfmsl by products": FedFMSL(
        ratio=RATIO,
        start=1,
        step=1,
        patience=2,
        tolerance=1.0,
        averaging="flexlora",
        gate_input="global",
    ),
    "fedfmsl of one factor": FedFMSL(
        ratio=RATIO,
        schedule="all",
        averaging="ffa_lora",
        weighting="uniform",
        gate_input="global",
    ),
    "pfl_moe in stage two": PFLMoE(ratio=RATIO, stage_one=0.0, held_out=0.2),
    "fedadapter in a long window": FedAdapter(
        ratio=RATIO, start_depth=0, start_width=4, window=3, weighting="uniform"
    ),
    "pfl_moe by halves": PFLMoE(ratio=RATIO, stage_one=0.0, gate="half", weighting="uniform"),
    "random_depth decaying": RandomDepth(depth=(2,), keep="linear", weighting="examples"),
    "random_depth unscaled": RandomDepth(depth=DEPTH, scaled=False),
    "depthfl at once": DepthFL(depth=DEPTH, ramp=0.0, temperature=2.0, weighting="examples"),
    "depthfl without distillation": DepthFL(depth=DEPTH, distill=0.0),
    "progressive by copies": Progressive(depth=DEPTH, start="copy", weighting="examples"),
    "progressive by two": Progressive(depth=DEPTH, step=2),
    "flm by distance": FLM(
        depth=(2,), warmup=1, cooldown=1, policy="persistent", measure="parameters", threshold=0.5
    ),
    "flm resampled": FLM(depth=(2,), warmup=0, cooldown=1, policy="resampled", merge=1e-3),
    "flm by importance": FLM(
        depth=DEPTH, warmup=0, cooldown=1, policy="importance", weighting="uniform"
    ),
    "flm by families": FLM(depth=(2,), warmup=1, cooldown=1, policy="slots", scaling=False),
}
WHOLE: dict[str, MethodSettings] = {
    "fedavg": FedAvg(weighting="uniform"),
    "heterofl": HeteroFL(ratio=(1.0,)),
    "federated_dropout": FederatedDropout(ratio=(1.0,)),
    "fedrolex": FedRolex(ratio=(1.0,)),
    "fedecover": FedEcover(ratio=(1.0,)),
    "fedbrb": FedBRB(ratio=(1.0,), strict=False),
    "msfusion": MSfusion(ratio=(1.0,), contrast=0.0, weighting="uniform"),
    "dpsgd": DPSGD(),
    "fedit": FedIT(weighting="uniform"),
    "fedfmsl": FedFMSL(schedule="all", stage_one=1.0, weighting="uniform"),
    "pfl_moe": PFLMoE(stage_one=1.0, weighting="uniform"),
    "fedadapter": FedAdapter(start_depth=2, most_depth=2, weighting="uniform"),
    "matched_averaging": MatchedAveraging(weighting="uniform"),
    "tomtit": Tomtit(weighting="uniform"),
    "hwamei": Hwamei(weighting="uniform"),
    "matched_averaging unmatched": MatchedAveraging(weighting="uniform", matching="none"),
    "random_depth": RandomDepth(depth=(3,)),
    "progressive": Progressive(depth=(3,)),
    "flm": FLM(depth=(3,), warmup=0, policy="persistent", weighting="uniform"),
    "hierfavg": HierFAVG(weighting="uniform"),
    "equal_finish": EqualFinish(weighting="uniform"),
    "fedbuff": FedBuff(),
    "fedasync": FedAsync(alpha=1.0),
    "random_depth decaying": RandomDepth(depth=(4, 3), keep="linear"),
    "progressive by copies": Progressive(depth=(3,), start="copy"),
    "heterofl in parameters": HeteroFL(ratio=(1.0,), width_scaling="parameters"),
    "fedrolex by class": FedRolex(ratio=(1.0, 1.0)),
    "fedbrb diagonal": FedBRB(ratio=(1.0,), strict=False, rolling="diagonal", broadcast=1.0),
    "fedbrb glued": FedBRB(ratio=(1.0,), strict=False, rolling="independent", broadcast=0.0),
    "fedbrb similar": FedBRB(ratio=(1.0,), strict=False, broadcast_weight="similarity"),
    "fedbrb of updates": FedBRB(ratio=(1.0,), strict=False, broadcast_of="updates"),
    "msfusion adaptive": MSfusion(
        ratio=(1.0,), contrast=0.0, weighting="uniform", overlap_schedule="adaptive"
    ),
    "msfusion staggered": MSfusion(
        ratio=(1.0,), contrast=0.0, weighting="uniform", layer_phase="staggered", stride=3
    ),
}
OTHERWISE = {
    "ffa_lora",
    "flexlora",
    "hetlora",
    "fedsa_lora",
    "flora",
    "ravan",
    "local",
    "depthfl",
    "fednova",
}
"""Methods that do something else than FedAvg even where everybody trains everything."""


class AdaptedNet(nn.Module):
    """A frozen layer with an adapter of `rank`, and a head that is trained whole.

    With `merge` the frozen layer is a parameter, so that adapters can be merged into it.
    """

    frozen: Tensor

    def __init__(self, sizes: Sizes, merge: bool) -> None:
        super().__init__()
        draw = torch.randn(8, 6, generator=seeds.generator(0, "frozen"), device="cpu")
        frozen = torch.empty(8, 6).copy_(draw)
        if merge:
            self.frozen = nn.Parameter(frozen)
        else:
            self.register_buffer("frozen", frozen, persistent=False)
        self.down = nn.Parameter(0.4 * torch.randn(sizes["rank"], 6))
        self.up = nn.Parameter(torch.zeros(8, sizes["rank"]))
        self.head = nn.Linear(8, sizes["classes"])

    def forward(self, inputs: Tensor) -> Output:
        hidden = inputs @ self.frozen.T + 2.0 * inputs @ self.down.T @ self.up.T
        return Output(self.head(hidden.relu()), None)


@dataclass(frozen=True)
class Adapted:
    """The smallest model with low-rank adapters; their rank is the axis that is cut."""

    rank: int = 4
    merge: bool = False

    def build_model(self, spec: Spec) -> Model:
        rank, classes = Tie("rank", (1,)), Tie("classes", (1,))
        return Model(
            build=lambda sizes: AdaptedNet(sizes, self.merge),
            sizes={"rank": self.rank, "classes": spec.num_classes},
            widths={
                "rank": Width(units=self.rank, quantum=1, size="rank"),
                "classes": Width(spec.num_classes, quantum=1, size="classes", cuttable=False),
            },
            depths={},
            ties=({"frozen": (None, None)} if self.merge else {})
            | {
                "down": (rank, None),
                "up": (None, rank),
                "head.weight": (classes, None),
                "head.bias": (classes,),
            },
            shapes=({"frozen": (8, 6)} if self.merge else {})
            | {
                "down": (self.rank, 6),
                "up": (8, self.rank),
                "head.weight": (spec.num_classes, 8),
                "head.bias": (spec.num_classes,),
            },
            low_rank=(LowRank("down", "up", 2.0, "frozen" if self.merge else None),),
        )


class Block(nn.Module):
    """A frozen layer that has an adapter of `rank`, or none where that is 0."""

    frozen: Tensor

    def __init__(self, number: int, size: int, rank: int) -> None:
        super().__init__()
        draw = torch.randn(8, size, generator=seeds.generator(number, "frozen"), device="cpu")
        self.register_buffer("frozen", torch.empty(8, size).copy_(draw / 2), persistent=False)
        if rank:
            self.down = nn.Parameter(0.4 * torch.randn(rank, size))
            self.up = nn.Parameter(torch.zeros(8, rank))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs @ self.frozen.T
        if hasattr(self, "down"):
            hidden = hidden + 2.0 * inputs @ self.down.T @ self.up.T
        return hidden.relu()


class BlocksNet(nn.Module):
    """Two frozen blocks, the last `blocks` of which have adapters, and a head."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        ranks = [sizes["rank"] if sizes["blocks"] > 1 - number else 0 for number in (0, 1)]
        self.blocks = nn.ModuleList([Block(n, (6, 8)[n], rank) for n, rank in enumerate(ranks)])
        self.head = nn.Linear(8, sizes["classes"])

    def forward(self, inputs: Tensor) -> Output:
        features = self.blocks[1](self.blocks[0](inputs))
        return Output(self.head(features), features)


@dataclass(frozen=True)
class Blocks:
    """The smallest model with adapters in numbered blocks, and features."""

    rank: int = 4

    def build_model(self, spec: Spec) -> Model:
        rank, classes = Tie("rank", (1,)), Tie("classes", (1,))
        ties: dict[str, tuple[Tie | None, ...]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for number, size in enumerate((6, 8)):
            ties |= {f"blocks.{number}.down": (rank, None), f"blocks.{number}.up": (None, rank)}
            shapes[f"blocks.{number}.down"] = (self.rank, size)
            shapes[f"blocks.{number}.up"] = (8, self.rank)
        return Model(
            build=BlocksNet,
            sizes={"rank": self.rank, "blocks": 2, "classes": spec.num_classes},
            widths={
                "rank": Width(units=self.rank, quantum=1, size="rank"),
                "classes": Width(spec.num_classes, quantum=1, size="classes", cuttable=False),
            },
            depths={"blocks": Depth(2, ("blocks.",), last=1)},
            ties=ties | {"head.weight": (classes, None), "head.bias": (classes,)},
            shapes=shapes
            | {"head.weight": (spec.num_classes, 8), "head.bias": (spec.num_classes,)},
            low_rank=tuple(
                LowRank(f"blocks.{number}.down", f"blocks.{number}.up", 2.0, None)
                for number in (0, 1)
            ),
            feature_size=lambda: 8,
        )


VECTORS = Spec(kind="vector", task="vector-classification", shape=(6,), num_classes=3)
IMAGES = Spec(kind="image", task="image-classification", shape=(1, 6, 6), num_classes=3)
FAMILIES: dict[str, tuple[MLP | CNN | Residual | Adapted | Blocks, Spec]] = {
    "mlp": (MLP(hidden=(8, 12)), VECTORS),
    "mlp with norms": (MLP(hidden=(16, 8), norm="layer"), VECTORS),
    "cnn": (CNN(channels=(8, 16), group_size=2), IMAGES),
    "deep": (Residual(stream=8, inner=8, blocks=3), VECTORS),
    "deep with exits": (Residual(stream=8, inner=8, blocks=3, exits=True), VECTORS),
    "adapted": (Adapted(), VECTORS),
    "merging": (Adapted(merge=True), VECTORS),
    "blocks": (Blocks(), VECTORS),
}
CLIENTS = tuple(Client(id=i, num_examples=5 + 3 * i) for i in range(6))
TRAINING = Training(lr=0.1, batch_size=4, momentum=0.5, clip_norm=5.0)
MASKED = replace(TRAINING, mask_absent_classes=True)

OF_BLOCKS = (FedFMSL, PFLMoE, FedAdapter)
"""They need features of the frozen model, or blocks: no other family has them."""
OF_ADAPTERS = (FedIT, FFALoRA, FlexLoRA, HetLoRA, FedSALoRA, FLoRA, Ravan, *OF_BLOCKS)
ON_ADAPTERS_TOO = (FedRolex,)
"""To the others a rank is an axis like any other; one of them is enough to see it."""
ON_BLOCKS_TOO = (FedRolex, FlexLoRA)
"""To the others adapters in blocks are adapters."""
OF_DEPTH = (RandomDepth, DepthFL, Progressive, FLM)
ON_DEPTH_TOO = (FedAvg, FedRolex)
"""To the others a deep model is a model like any other."""
OF_WEIGHING = (HierFAVG, EqualFinish, FedNova, FedBuff, FedAsync)
"""They weigh answers in other ways, of whatever model: one family is enough."""


def suits(method: type[MethodSettings], family: str) -> bool:
    if method in OF_WEIGHING:
        return family == "mlp"
    if family == "merging" or method is FLoRA:
        return family == "merging" and method is FLoRA
    if family == "blocks" or method in OF_BLOCKS:
        return family == "blocks" and method in (*OF_BLOCKS, *ON_BLOCKS_TOO)
    if family == "adapted":
        return method in (*OF_ADAPTERS, *ON_ADAPTERS_TOO)
    if family.startswith("deep") or method in OF_DEPTH:
        asked = family.startswith("deep") and method in (*OF_DEPTH, *ON_DEPTH_TOO)
        return asked and (method is not DepthFL or family == "deep with exits")
    return method not in OF_ADAPTERS


def home_of(method: type[MethodSettings]) -> str:
    """The one family that is enough where the model is no matter."""
    if method is FLoRA:
        return "merging"
    if method in OF_BLOCKS:
        return "blocks"
    if method in OF_DEPTH:
        return "deep with exits" if method is DepthFL else "deep"
    return "adapted" if method in OF_ADAPTERS else "mlp"


def home(name: str) -> str:
    return home_of(type(CUT[name]))


EVERYWHERE = [
    (name, family) for family in FAMILIES for name in METHODS if suits(METHODS[name], family)
]
"""The papers' methods on every model; further settings on one are enough."""

each_method = pytest.mark.parametrize("name", CUT)
each_pair = pytest.mark.parametrize(
    ("name", "family"), [*EVERYWHERE, *((name, home(name)) for name in CUT if name not in METHODS)]
)


@cache
def model_of(family: str) -> Model:
    settings, spec = FAMILIES[family]
    return settings.build_model(spec)


@cache
def examples_of(kind: str, client: int, use: str = "examples") -> Examples:
    """Two of the three classes, told apart by which third of the inputs is bright."""
    count = CLIENTS[client].num_examples
    draw = seeds.generator(0, client, kind, use)
    labels = (torch.arange(count) % 2 + client) % 3
    bright = torch.nn.functional.one_hot(labels, 3).float()
    if kind == "vector":
        inputs = bright.repeat(1, 2) * 2 - 1 + 0.3 * torch.randn(count, 6, generator=draw)
    else:
        noise = torch.randint(0, 60, (count, 1, 6, 6), generator=draw)
        inputs = (bright.repeat_interleave(2, 1)[:, None, None] * 180 + noise).to(torch.uint8)
    return Examples(inputs=inputs, labels=labels)


@dataclass
class Federation:
    """A synchronous loop over the hooks, with every source of difference under the test's hand."""

    method: MethodSettings
    family: str
    seed: int = 0
    training: Training = TRAINING

    @property
    def model(self) -> Model:
        return model_of(self.family)

    def init(self, rounds: int = 4) -> State:
        return self.method.init(self.model, self.seed, rounds)

    def tasks(self, state: State, clients: Sequence[Client] = CLIENTS[:4]) -> Iterator[Task]:
        return self.method.configure(self.model, state, clients, self.training)

    def updates(
        self, tasks: Iterator[Task], memories: dict[int, Memory] | None = None
    ) -> list[Update]:
        """With `memories` clients remember, as they do in engines; else each is new."""
        kind = FAMILIES[self.family][1].kind
        worker = ClientWorker(
            model=self.model,
            method=self.method,
            examples=lambda client: examples_of(kind, client),
            validation=lambda client: examples_of(kind, client, "validation"),
            seed=self.seed,
        )
        updates = []
        shapes = {name: torch.empty(s, device="meta") for name, s in self.model.shapes.items()}
        for task in tasks:
            update, memory = worker.work(task, (memories or {}).get(task.client.id, {}))
            if memories is not None:
                memories[task.client.id] = memory
            check_update(task, update, shapes, self.model)  # as whatever is folded
            updates.append(update)
        return updates

    def aggregate(
        self, state: State, updates: Sequence[Update], clients: Sequence[Client] = CLIENTS[:4]
    ) -> State:
        return self.method.aggregate(self.model, state, clients, iter(updates))

    def round(
        self,
        state: State,
        clients: Sequence[Client] = CLIENTS[:4],
        memories: dict[int, Memory] | None = None,
    ) -> State:
        updates = self.updates(self.tasks(state, clients), memories)
        return self.aggregate(state, updates, clients)

    def run(self, rounds: int, memories: dict[int, Memory] | None = None) -> State:
        state, memories = self.init(rounds), {} if memories is None else memories
        for round in range(rounds):  # another cohort in every round
            state = self.round(state, [CLIENTS[(round + i) % 6] for i in (0, 3, 2)], memories)
        return state

    def loss(self, state: State, memories: dict[int, Memory] | None = None) -> float:
        """Mean loss over all clients' examples, of the predictor or of the clients' own ones."""
        total, count = 0.0, 0
        for client in range(len(CLIENTS)):
            predictor = self.method.predictor(self.model, state)
            if hasattr(self.method, "personal"):
                own = (memories or {}).get(client, {})
                predictor = self.method.personal(self.model, state, own)
            model, rule = predictor.model, predictor.rule
            forward = forward_of(model, model.whole(), model.module().eval(), "none")
            examples = examples_of(FAMILIES[self.family][1].kind, client)
            inputs, labels = examples.batch(torch.arange(len(examples)))
            with torch.no_grad():
                logits = (
                    forward(predictor.params, inputs).logits
                    if rule is None
                    else rule(forward, predictor.params, inputs).logits
                )
            total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            count += len(labels)
        return total / count


def bits(state: State) -> tuple[str, str, object]:
    plain = {"seed": state.seed, "rounds": state.rounds, "round": state.round}
    notes = copy.deepcopy(dict(state.notes))
    return sha256(state.params), sha256(state.extra), plain | {"notes": notes}


def task_bits(task: Task) -> tuple[object, ...]:
    views = {name: view.key for name, view in task.submodel.views.items()}
    return (
        sha256(task.params),
        sha256(task.extra),
        copy.deepcopy(dict(task.options)),
        dict(task.submodel.sizes),
        views,
        task.training,
        task.trainable,
        task.client,
    )


def test_every_method_is_under_contract() -> None:
    assert METHODS.keys() - WHOLE.keys() == OTHERWISE
    for name, method in METHODS.items():
        assert type(CUT[name]) is method
        assert name in OTHERWISE or type(WHOLE[name]) is method


@pytest.mark.parametrize("method", OF_ADAPTERS)
def test_methods_of_adapters_refuse_a_model_without_any(method: type[MethodSettings]) -> None:
    with pytest.raises(ConfigError, match="averages low-rank adapters, and this model has none"):
        method().init(model_of("mlp"), 0, 1)


@pytest.mark.parametrize("method", OF_DEPTH)
def test_methods_of_depth_refuse_a_model_without_blocks(method: type[MethodSettings]) -> None:
    with pytest.raises(ConfigError, match="--model residual"):
        next(
            method().configure(
                model_of("mlp"), method().init(model_of("mlp"), 0, 9), CLIENTS, TRAINING
            )
        )


@pytest.mark.parametrize("method", OF_DEPTH)
@pytest.mark.parametrize("depth", [(), (2, 0)])
def test_methods_of_depth_refuse_no_depth(
    method: type[RandomDepth | DepthFL | Progressive | FLM], depth: tuple[int, ...]
) -> None:
    with pytest.raises(ConfigError, match="how many blocks each client class trains, at least 1"):
        next(
            Federation(method(depth=depth), home_of(method)).tasks(
                State(params={}, seed=0, rounds=9)
            )
        )


@each_pair
def test_hooks_do_not_change_their_arguments(name: str, family: str) -> None:
    method, model = CUT[name], model_of(family)
    federation = Federation(method, family, training=MASKED)
    memories: dict[int, Memory] = {}
    # A state with notes, where a method keeps some, and clients that remember.
    state = federation.round(federation.init(), memories=memories)
    clients = list(CLIENTS[:4])
    before = bits(state)
    tasks = list(method.configure(model, state, clients, MASKED))
    assert (bits(state), clients) == (before, list(CLIENTS[:4]))
    updates = []
    for task in tasks:
        sent, memory = task_bits(task), memories[task.client.id] | {"kept": torch.ones(2)}
        remembered = sha256(memory)
        fit = method.local(model, task, memory)
        module = model.module(task.submodel.sizes).train()
        forward = forward_of(model, task.submodel, module, fit.width_scaling)
        examples = examples_of(FAMILIES[family][1].kind, task.client.id)
        fitted = execute(fit, forward, examples, seeds.generator(0, "batches"))
        trained = sha256(fitted.params)
        assert task_bits(task) == sent
        updates.append(method.report(model, task, fitted, memory)[0])
        assert (task_bits(task), sha256(fitted.params)) == (sent, trained)
        assert sha256(memory) == remembered
    deltas = [sha256(update.delta) for update in updates]
    after = method.aggregate(model, state, clients, iter(updates))
    assert (bits(state), clients) == (before, list(CLIENTS[:4]))
    assert [sha256(update.delta) for update in updates] == deltas
    result = bits(after)
    method.predictor(model, after)
    assert bits(after) == result


@each_method
def test_a_worker_leaves_its_task_alone(name: str) -> None:
    federation = Federation(CUT[name], home(name))
    task = next(federation.tasks(federation.init()))
    sent = task_bits(task)
    federation.updates(iter([task]))
    assert task_bits(task) == sent


def test_a_worker_leaves_the_global_generator_alone() -> None:
    federation = Federation(FedRolex(), "mlp")
    task = next(federation.tasks(federation.init()))
    before = torch.get_rng_state()
    federation.updates(iter([task]))
    assert torch.equal(torch.get_rng_state(), before)


@each_method
def test_server_hooks_leave_the_global_generator_alone(name: str) -> None:
    federation = Federation(CUT[name], home(name))
    state = federation.init()
    updates = federation.updates(federation.tasks(state))
    before = torch.get_rng_state()
    federation.init()
    list(federation.tasks(state))
    federation.aggregate(state, updates)
    assert torch.equal(torch.get_rng_state(), before)


def copied(params: Params) -> Params:
    return {name: tensor.clone() for name, tensor in params.items()}


@each_method
def test_an_update_is_not_read_after_the_next_one_was_asked_for(name: str) -> None:
    """Engines reuse an update's memory: nothing may be read from it later."""
    federation = Federation(CUT[name], home(name))
    state = federation.init()
    clean = federation.updates(federation.tasks(state))
    spoilt = [replace(u, delta=copied(u.delta), extra=copied(u.extra)) for u in clean]

    def passing() -> Iterator[Update]:
        for update in spoilt:
            yield update
            for tensor in (*update.delta.values(), *update.extra.values()):
                tensor.fill_(99.0)

    after = federation.method.aggregate(federation.model, state, CLIENTS[:4], passing())
    assert bits(after) == bits(federation.aggregate(state, clean))


@each_pair
def test_where_nobody_answers_only_the_round_advances(name: str, family: str) -> None:
    federation = Federation(CUT[name], family)
    state = federation.round(federation.init())
    after = federation.aggregate(state, [])
    assert sha256(after.params) == sha256(state.params)
    assert after.round == state.round + 1
    assert (after.seed, after.rounds) == (state.seed, state.rounds)


@each_pair
def test_a_seed_decides_every_bit(name: str, family: str) -> None:
    method = CUT[name]
    once, again = Federation(method, family).run(3), Federation(method, family).run(3)
    assert bits(once) == bits(again)
    other = Federation(method, family, seed=1).run(3)
    assert sha256(other.params) != sha256(once.params)


@each_pair
def test_the_order_of_updates_changes_no_bit(name: str, family: str) -> None:
    federation, memories = Federation(CUT[name], family), {}
    state = federation.round(federation.init(), memories=memories)
    updates = federation.updates(federation.tasks(state), memories)
    orders = list(itertools.permutations(updates))[::5]
    first, *others = [bits(federation.aggregate(state, order)) for order in orders]
    assert all(other == first for other in others)


ENTRYWISE = [name for name, method in CUT.items() if method.entrywise]


@pytest.mark.parametrize("name", ENTRYWISE)
@pytest.mark.parametrize("training", [TRAINING, MASKED], ids=["plain", "masked"])
def test_an_entrywise_method_averages_what_was_trained_and_no_more(
    name: str, training: Training
) -> None:
    """Peers that keep a part fold nothing but that, and learn nothing from the others."""
    federation, memories = Federation(CUT[name], home(name), training=training), {}
    state = federation.round(federation.init(), memories=memories)
    assert (state.notes, state.extra) == ({}, {})
    updates = federation.updates(federation.tasks(state), memories)
    mean = average_trained(CUT[name], federation.model, state, CLIENTS[:4], iter(updates))
    assert bits(federation.aggregate(state, updates)) == bits(mean)


def test_what_looks_at_the_whole_is_not_entrywise() -> None:
    assert {name for name in CUT if name not in ENTRYWISE} == {
        "fedecover",
        "fedecover decaying",
        "fedbrb",
        "fedbrb diagonal",
        "fedbrb glued",
        "fedbrb similar",
        "fedbrb of updates",
        "msfusion adaptive",
        "msfusion against all",
        "msfusion against peers",
        "flexlora",
        "flora",
        "hetlora",
        "hetlora pruning",
        "ravan",
        "ravan by size",
        "fedfmsl",
        "fedfmsl in stage two",
        "fedfmsl alone",
        "fedfmsl from the input",
        "fedfmsl by products",
        "fedfmsl of one factor",
        "pfl_moe",
        "pfl_moe in stage two",
        "pfl_moe by halves",
        "fedadapter",
        "fedadapter in a long window",
        "matched_averaging",
        "matched_averaging from own starts",
        "progressive",
        "progressive by copies",
        "progressive by two",
        "flm",
        "flm by distance",
        "flm resampled",
        "flm by importance",
        "flm by families",
        "hierfavg normalised",
        "fednova",
        "fedbuff",
        "fedbuff by examples",
        "fedasync",
        "fedasync by examples",
    }


@each_pair
def test_who_trains_what_is_known_without_values(name: str, family: str) -> None:
    """Peers work out from the public part of a state alone what everybody trains."""
    federation = Federation(CUT[name], family)
    state = federation.round(federation.init())
    bare = replace(state, params={n: t.to("meta") for n, t in state.params.items()})
    if isinstance(federation.method, FedAdapter):  # its groups' parameters
        bare = replace(bare, extra={n: t.to("meta") for n, t in state.extra.items()})
    for task, planned in zip(federation.tasks(state), federation.tasks(bare), strict=True):
        views = [{n: v.key for n, v in t.submodel.views.items()} for t in (task, planned)]
        assert views[0] == views[1]
        assert task.trainable == planned.trainable
        assert task.params.keys() == planned.params.keys()
        assert all(tensor.is_meta for tensor in planned.params.values())


@each_pair
def test_a_state_survives_a_checkpoint(name: str, family: str, tmp_path: Path) -> None:
    federation = Federation(CUT[name], family)
    memories: dict[int, Memory] = {}
    state = federation.round(federation.init(), memories=memories)
    saved = checkpoint.Checkpoint(
        states=[state],
        coverage=Coverage(federation.model.shapes).counts,
        memories={client: memory for client, memory in memories.items() if memory},
        totals={},
        events_bytes=0,
    )
    checkpoint.save(tmp_path, saved)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    (again,) = found.states
    assert bits(again) == bits(state)
    after = federation.round(state, memories=memories)
    assert bits(federation.round(again, memories=dict(found.memories))) == bits(after)


@cache
def fedavg_bits(family: str, weighting: Weighting, training: Training) -> str:
    return sha256(Federation(FedAvg(weighting=weighting), family, training=training).run(3).params)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        *(pair for pair in EVERYWHERE if pair[0] not in OTHERWISE),
        *((name, home_of(type(WHOLE[name]))) for name in WHOLE if name not in METHODS),
    ],
)
@pytest.mark.parametrize("training", [TRAINING, MASKED], ids=["plain", "masked"])
def test_whole_models_reduce_to_fedavg(name: str, family: str, training: Training) -> None:
    state = Federation(WHOLE[name], family, training=training).run(3)
    assert sha256(state.params) == fedavg_bits(family, "uniform", training)


@pytest.mark.parametrize("name", WHOLE)
def test_whole_models_weighted_by_examples_reduce_to_fedavg(name: str) -> None:
    method = replace(WHOLE[name], weighting="examples")
    family = home_of(type(method))
    assert sha256(Federation(method, family).run(3).params) == fedavg_bits(
        family, "examples", TRAINING
    )


@each_pair
def test_a_part_is_no_larger_than_its_ratio(name: str, family: str) -> None:
    method, model = CUT[name], model_of(family)
    federation = Federation(method, family)
    state = federation.init()
    for round in range(9):
        for task in federation.tasks(replace(state, round=round), CLIENTS):
            if isinstance(method, OF_DEPTH):
                assert (
                    trained_blocks(model, task) <= method.depth[task.client.id % len(method.depth)]
                )
                continue
            ratio = RATIO[task.client.id % 2]
            if isinstance(method, Ravan):  # every head runs everywhere; the others are frozen
                counts = {len(heads) for heads in task.options["heads"]}
                assert counts == {math.ceil(ratio * method.heads)}
                continue
            limit = {a: kept_units(model, a, ratio) for a in model.cuttable}
            asked = model.slice({axis: range(units) for axis, units in limit.items()})
            assert task.submodel.num_entries <= asked.num_entries
            for axis, units in limit.items():
                width = model.widths[axis]
                assert task.submodel.sizes[width.size] <= units * width.quantum


def trained_blocks(model: Model, task: Task) -> int:
    names = task.submodel.views if task.trainable is None else task.trainable
    places = [model.depths["blocks"].locate(name) for name in names]
    return len({place[1] for place in places if place})


def held(federation: Federation, task: Task, memory: Memory) -> Params:
    """What a client has of its part: what was sent, then or before, or what it makes of that."""
    if isinstance(federation.method, FedFMSL | PFLMoE) and task.options["second"]:
        return federation.method.local(federation.model, task, memory).references["global"]
    if not isinstance(federation.method, Ravan):
        return task.params
    fit = federation.method.local(federation.model, task, {})
    return {name: value for name, value in fit.params.items() if name not in fit.beside}


def source(federation: Federation, state: State, task: Task) -> Params:
    """The parameters of which a client gets its part."""
    if not isinstance(federation.method, FedAdapter):
        return state.params
    own = f"{task.options['group']}/"  # of a group that tries another configuration
    others = {n.removeprefix(own): t for n, t in state.extra.items() if n.startswith(own)}
    return {**state.params, **others}


@each_pair
def test_what_is_cut_is_the_state_at_its_views_and_fits_a_module(name: str, family: str) -> None:
    federation, memories = Federation(CUT[name], family), {}
    state = federation.round(federation.init(), CLIENTS[:3], memories)
    for task in federation.tasks(state):
        assert (task.round, task.training) == (state.round, TRAINING)
        params = held(federation, task, memories.get(task.client.id, {}))
        assert sha256(params) == sha256(cut(source(federation, state, task), task.submodel))
        for view in task.submodel.views.values():
            for index in view.index:
                assert len(set(index_tensor(index).tolist())) == index_tensor(index).numel()
        federation.model.module(task.submodel.sizes).load_state_dict(params, strict=True)


@each_pair
def test_configure_names_every_client_once_in_the_order_asked(name: str, family: str) -> None:
    federation = Federation(CUT[name], family)
    asked = [CLIENTS[i] for i in (4, 0, 3)]
    assert [task.client for task in federation.tasks(federation.init(), asked)] == asked


class CountingReads(dict[str, Tensor]):
    """Parameters that count how often one of them is read."""

    reads = 0

    def __getitem__(self, name: str) -> Tensor:
        self.reads += 1
        return super().__getitem__(name)


@each_method
def test_configure_cuts_when_a_task_is_asked_for(name: str) -> None:
    federation = Federation(CUT[name], home(name))
    state = federation.init()
    params, extra = CountingReads(state.params), CountingReads()
    if isinstance(CUT[name], FedAdapter):  # its groups' parameters
        extra.update(state.extra)
        state = replace(state, extra=extra)
    tasks = federation.tasks(replace(state, params=params))
    assert params.reads + extra.reads == 0
    expected, last = 0, None
    for _ in range(2):
        task = next(tasks)
        whole = isinstance(CUT[name], FedAvg | MatchedAveraging)  # there all hold it: no copies
        if not whole and task.params is not last:
            expected += len(task.params)
        assert params.reads + extra.reads == expected
        last = task.params


@each_pair
def test_the_loss_falls(name: str, family: str) -> None:
    # With some whole clients every weight is trained; below that HeteroFL's full model is noise.
    method = CUT[name]
    method = replace(
        method, **({"depth": (3, 2)} if isinstance(method, OF_DEPTH) else {"ratio": (1.0, 0.5)})
    )
    method = replace(method, strict=False) if isinstance(method, FedBRB) else method
    federation = Federation(method, family)
    start = federation.loss(federation.init(rounds=20))
    memories: dict[int, Memory] = {}
    assert federation.loss(federation.run(20, memories), memories) < 0.9 * start


def with_nan(params: Params) -> Params:
    name, tensor = next(iter(params.items()))
    broken = tensor.clone()
    broken.view(-1)[0] = torch.nan
    return params | {name: broken}


@each_pair
def test_refused_work_is_not_folded(name: str, family: str) -> None:
    federation = Federation(CUT[name], family)
    state = federation.init()
    updates = federation.updates(federation.tasks(state))
    before = bits(state)
    if not updates[1].delta:
        if updates[1].extra:  # who sends nothing cannot send nonsense
            wrong = replace(updates[1], extra=with_nan(updates[1].extra))
            with pytest.raises(UpdateError, match="finite"):
                federation.aggregate(state, [updates[0], wrong, *updates[2:]])
            assert bits(state) == before
        return
    broken = [updates[0], replace(updates[1], delta=with_nan(updates[1].delta)), *updates[2:]]
    with pytest.raises(UpdateError, match="finite"):
        federation.aggregate(state, broken)
    assert bits(state) == before
    without = federation.aggregate(state, [*updates[:1], *updates[2:]])

    def accepted() -> Iterator[Update]:  # what the runner does in front of `aggregate`
        for update in broken:
            try:
                check_delta(update.submodel, update.delta, state.params)
            except UpdateError:
                continue
            yield update

    after = federation.method.aggregate(federation.model, state, CLIENTS[:4], accepted())
    assert bits(after) == bits(without)
    assert bits(after)[:2] != bits(federation.aggregate(state, updates))[:2]


@each_method
def test_who_does_not_answer_keeps_nobody_from_being_counted(name: str) -> None:
    # A single answer moves the model by that client's own change, however many were asked.
    federation = Federation(CUT[name], home(name))
    state = federation.init()
    update = federation.updates(federation.tasks(state))[2]
    asked_four = federation.aggregate(state, [update])
    asked_one = federation.aggregate(state, [update], CLIENTS[2:3])
    for kind in ("params", "extra"):
        ones, fours = getattr(asked_one, kind), getattr(asked_four, kind)
        for one, four in zip(ones.values(), fours.values(), strict=True):
            torch.testing.assert_close(one, four, rtol=0, atol=1e-7)


@each_method
def test_updates_are_taken_one_at_a_time(name: str) -> None:
    federation = Federation(CUT[name], home(name))
    state = federation.init()
    waiting = federation.tasks(state)
    order: list[str] = []

    def live() -> Iterator[Update]:
        for task in waiting:
            order.append("asked")
            yield federation.updates(iter([task]))[0]

    after = federation.method.aggregate(federation.model, state, CLIENTS[:4], live())
    assert order == ["asked"] * 4
    assert bits(after) == bits(federation.round(state))


@dataclass
class OnDevices(Federation):
    """The same, with tasks and updates as devices get and send them, in parcels on a disk."""

    def tasks(self, state: State, clients: Sequence[Client] = CLIENTS[:4]) -> Iterator[Task]:
        for task in super().tasks(state, clients):
            outgoing = Outgoing(parts=task_parts(task, {}), most_bytes=200)
            letter = letter_of(json.loads(outgoing.letter.model_dump_json()))
            numbers = range(len(letter.parcels))
            parcels = {letter.parcels[n].sha256: outgoing.parcel(n) for n in numbers}
            later = Later(
                groups=frozenset({"params"}),
                read=lambda name, key, parcels=parcels: load(parcels[name])[key],
            )
            received, _ = task_of(*read_letter(letter, parcels.__getitem__, later))
            assert isinstance(received.params, Stored)
            yield received

    def updates(
        self, tasks: Iterator[Task], memories: dict[int, Memory] | None = None
    ) -> list[Update]:
        asked = list(tasks)
        updates = zip(super().updates(iter(asked), memories), asked, strict=True)
        return [decode_update(encode_update(each, {}), task)[0] for each, task in updates]


@pytest.mark.parametrize(("name", "family"), [(name, home(name)) for name in CUT])
def test_on_devices_every_method_has_the_same_bits(name: str, family: str) -> None:
    """What is received stays on the disk and is read when a method looks at it."""
    here, there = {}, {}
    expected = Federation(CUT[name], family).run(4, here)
    assert bits(OnDevices(CUT[name], family).run(4, there)) == bits(expected)
    assert {c: sha256(m) for c, m in there.items()} == {c: sha256(m) for c, m in here.items()}
