"""How much of a model a client can adapt, and what of a task its costs go by."""

import functools
from dataclasses import replace

import pytest
import torch

from tesserafl.core.errors import CapacityError
from tesserafl.core.fit import Training
from tesserafl.core.messages import Client, Task
from tesserafl.methods import FedFMSL, FedIT
from tesserafl.models.costs import Costs, costs_of, frozen_entries
from tesserafl.run.costs import CostTable, with_depth
from tesserafl.run.experiment import Experiment, from_json
from tesserafl.run.setup import Setup, prepare

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

BLOCKS = 4
OPTIONS = {
    "hidden_size": 16,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "patch_size": 4,
}
CLIENT = Client(id=1, num_examples=50)


def experiment(**changes: object) -> Experiment:
    base = {
        "data": {"num_clients": 2, "partition": "iid", "max_train": 100},
        "model": {"name": "lora", "config": "vit", "options": OPTIONS, "rank": 2},
        "method": {"name": "fedfmsl", "ratio": [1.0], "schedule": "all"},
        "training": {"batch_size": 8, "epochs": 3},
        "clients_per_round": 2,
    }
    return from_json({**base, **changes})


@functools.cache
def setup() -> Setup:
    return prepare(experiment())


COUNTED: dict[object, Costs] = {}
"""Costs of the one model, method and training of most tables here: counting takes a second."""


def table(**changes: object) -> CostTable:
    return CostTable(
        experiment=replace(setup().experiment, **changes),
        model=setup().model,
        data=setup().data,
        _known=COUNTED if changes.keys() <= {"client_seconds", "client_gflops"} else {},
    )


def of_blocks(blocks: int) -> object:
    return table().of_part(setup().model.whole(), setup().model.adapted(blocks))


def work_of(blocks: int) -> float:
    """FLOPs of client 1: 3 epochs over 50 examples, and a look at two references."""
    cost = of_blocks(blocks)
    return 50 * (3 * cost.flops_per_example + 2 * cost.forward_flops_per_example)


def depth_in(memory_bytes: int | None, **changes: object) -> int | None:
    return with_depth(replace(CLIENT, memory_bytes=memory_bytes), table(**changes)).depth


def test_more_memory_never_means_fewer_blocks() -> None:
    peaks = [of_blocks(blocks).peak_bytes for blocks in range(1, BLOCKS + 1)]
    assert peaks == sorted(set(peaks))
    for blocks, peak in enumerate(peaks, start=1):
        assert depth_in(peak) == blocks  # what it takes to the byte
        if blocks > 1:
            assert depth_in(peak - 1) == blocks - 1
    assert depth_in(10 * peaks[-1]) == BLOCKS


def test_more_time_never_means_fewer_blocks() -> None:
    """Time = FLOPs of an example x examples x epochs, and of the references, / speed."""
    for blocks in range(1, BLOCKS + 1):
        gigaflops = work_of(blocks) / 1e9
        for scale, found in ((1.001, blocks), (0.999, blocks - 1)):
            # Client 1 is of the second class.
            limits = {"client_seconds": 2.0, "client_gflops": (1e-9, gigaflops * scale / 2)}
            if found:
                assert depth_in(None, **limits) == found
            else:
                with pytest.raises(CapacityError):
                    depth_in(None, **limits)


def test_both_limits_hold() -> None:
    two, three = of_blocks(2), of_blocks(3)
    speed = (work_of(3) / 1e9,)
    assert depth_in(two.peak_bytes, client_seconds=1.0, client_gflops=speed) == 2
    assert depth_in(three.peak_bytes * 9, client_seconds=1.001, client_gflops=speed) == 3


def test_a_client_that_fits_nothing_is_an_error_that_says_what_it_takes() -> None:
    needed = of_blocks(1).peak_bytes
    with pytest.raises(CapacityError) as caught:
        depth_in(needed - 1)
    text = str(caught.value)
    assert "client 1 can train not even the adapters of one block" in text
    assert f"{needed / 2**20:.2f} MiB" in text and "client_memory_mib or client_seconds" in text
    work = work_of(1)
    assert f"{work / 1e9:.3g} GFLOP" in text


def test_without_limits_or_blocks_a_client_is_as_it_was() -> None:
    assert with_depth(CLIENT, table()) == CLIENT
    flat = prepare(
        experiment(
            model={"name": "mlp", "hidden": [8]},
            method={"name": "fedavg", "ratio": [1.0]},
            client_memory_mib=[100.0],
        )
    )
    assert all(client.depth is None for client in flat.clients)
    assert with_depth(flat.clients[0], flat.costs()) == flat.clients[0]


def test_depths_are_for_methods_that_go_by_them() -> None:
    limited = experiment(client_memory_mib=[of_blocks(2).peak_bytes / 2**20, 1000.0])
    assert [client.depth for client in prepare(limited).clients] == [2, BLOCKS]
    plain = replace(limited, method=FedIT())
    assert [client.depth for client in prepare(plain).clients] == [None, None]


def task_of(trainable: frozenset[str] | None) -> Task:
    return Task(
        round=0,
        client=CLIENT,
        submodel=setup().model.whole(),
        params={},
        training=Training(),
        trainable=trainable,
    )


def test_costs_go_by_what_is_trained() -> None:
    costs, model = table(), setup().model
    everything, *fewer = [
        costs.of(task_of(trainable))
        for trainable in (None, model.adapted(2), model.adapted(1), model.adapted(0))
    ]
    assert everything == costs.of(task_of(frozenset(model.shapes)))
    assert everything.num_trained == everything.num_entries == model.num_entries
    for larger, smaller in zip([everything, *fewer], fewer, strict=False):
        assert smaller.num_trained < larger.num_trained
        assert smaller.flops_per_example < larger.flops_per_example
        assert smaller.activation_bytes < larger.activation_bytes
        assert smaller.peak_bytes < larger.peak_bytes
        assert smaller.num_entries == larger.num_entries
        assert smaller.bytes_each_way == larger.bytes_each_way
        assert smaller.forward_flops_per_example == larger.forward_flops_per_example
    for blocks, found in zip((2, 1, 0), fewer, strict=True):
        entries = sum(torch.Size(model.shapes[name]).numel() for name in model.adapted(blocks))
        assert found.num_trained == entries


def test_costs_are_of_the_backward_pass_down_to_the_lowest_block() -> None:
    """Blocks are alike, so each costs as much as the next."""
    steps = [of_blocks(n + 1).flops_per_example - of_blocks(n).flops_per_example for n in (1, 2)]
    assert steps[0] == pytest.approx(steps[1]) and steps[0] > 0
    # From the input only: all that is above is passed through on the way back.
    model, whole = setup().model, setup().model.whole()
    first = model.adapted(0) | (model.adapted(BLOCKS) - model.adapted(BLOCKS - 1))
    below = table().of_part(whole, first)
    assert below.num_trained == of_blocks(1).num_trained
    assert below.activation_bytes > of_blocks(2).activation_bytes
    assert below.flops_per_example > of_blocks(2).flops_per_example


@pytest.mark.parametrize(
    ("settings", "looked_up"), [({}, 2), ({"gate_input": "global"}, 1), ({"gate": "half"}, 1)]
)
def test_what_is_looked_up_lies_in_memory(settings: dict, looked_up: int) -> None:
    """The global expert and, where the gate reads that, the foundation model."""
    whole = setup().model.whole()
    mixing = table(method=FedFMSL(schedule="all", **settings)).of_part(whole, None)
    plain = table(method=FedIT()).of_part(whole, None)
    assert mixing.peak_bytes == plain.peak_bytes + looked_up * plain.bytes_each_way


def test_frozen_numbers_are_the_frozen_model_and_no_more() -> None:
    import transformers

    model = setup().model
    config = transformers.ViTConfig(
        **OPTIONS, image_size=8, num_channels=1, num_labels=10, hidden_act="gelu"
    )
    bare = transformers.ViTForImageClassification(config)
    head = sum(p.numel() for n, p in bare.named_parameters() if n.startswith("classifier"))
    assert frozen_entries(model) == sum(p.numel() for p in bare.parameters()) - head


@pytest.mark.parametrize(
    "kind", [{"name": "mlp", "hidden": [8]}, {"name": "resnet", "norm": "batch"}]
)
def test_a_model_that_is_trained_whole_has_no_frozen_numbers(kind: dict) -> None:
    """Running statistics of normalisations are buffers, but no frozen weights."""
    found = prepare(experiment(model=kind, method={"name": "fedavg", "ratio": [1.0]}))
    assert frozen_entries(found.model) == 0


def test_what_a_step_keeps_beside_its_parameters_is_counted_once() -> None:
    """Received and trained parameters, gradients, activations, frozen weights."""
    model, data = setup().model, setup().data
    inputs, labels = data.clients[0].train.batch(torch.arange(8))
    names = model.adapted(1)
    found = costs_of(model, model.whole(), Training(lr=0.1), inputs, labels, names)
    frozen = sum(b.numel() * b.element_size() for b in model.module(device="meta").buffers())
    parameters = 4 * (found.num_entries + 2 * found.num_trained)
    assert found.peak_bytes == parameters + found.activation_bytes + frozen
