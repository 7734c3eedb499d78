"""Short runs of a global expert, own experts and a gate, as a user starts them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bytes_encoder import write_encoder, write_texts

from tesserafl.cli import main
from tesserafl.core.errors import CapacityError, ConfigError
from tesserafl.data import DataSettings
from tesserafl.experiments import EXPERIMENTS
from tesserafl.run.experiment import Experiment, from_json, to_json
from tesserafl.run.runner import resume, start
from tesserafl.run.setup import prepare

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

# peft reads an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

BLOCK = 2 * (2 * 32 + 32 * 2)
"""Entries of a block's adapters: of the queries and of the values, rank 2."""
HEAD = 2 * 32 + 2
EXPERT = 3 * BLOCK + HEAD
GATE = 2 * 4 * 32
"""Entries of the gate's shared adapter."""


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"), 120)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved encoder of bytes, without a head."""
    return write_encoder(tmp_path_factory.mktemp("encoder"), 3)


def short(folder: Path, encoder: Path, method: dict, **changes: object) -> Experiment:
    base = {
        "data": {
            "path": str(folder),
            "partition": "iid",
            "num_clients": 4,
            "sequence_length": 12,
            "test": 0.2,
            "validation": 0.2,
        },
        "model": {"name": "lora", "rank": 2, "alpha": 4.0, "config": str(encoder)},
        "method": method,
        "training": {"lr": 0.1, "batch_size": 8},
        "rounds": 4,
        "clients_per_round": 3,
        "checkpoint_every": 1,
    }
    return from_json({**base, **changes})


PLATEAU = {
    "name": "fedfmsl",
    "ratio": [1.0],
    "start": 1,
    "step": 1,
    "patience": 2,
    "tolerance": 1.1,
    "gate_width": 4,
}
"""Any two accuracies make a plateau."""
METHODS = {"fedfmsl": PLATEAU, "pfl_moe": {"name": "pfl_moe", "ratio": [1.0]}}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
OTHERWISE = {
    **PLATEAU,
    "averaging": "flexlora",
    "gate_input": "global",
}
one_method = pytest.mark.parametrize(
    "method",
    [
        METHODS["fedfmsl"],
        OTHERWISE,
        pytest.param(METHODS["pfl_moe"], marks=pytest.mark.slow),
    ],
    ids=["fedfmsl", "fedfmsl otherwise", "pfl_moe"],
)


def rounds_of(run: Path) -> list[dict]:
    lines = (run / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == "round"]


def told(summary: dict) -> dict:
    """What a summary says of the result; where and how long it took are left out."""
    return {key: value for key, value in summary.items() if key not in ("run", "seconds")}


def timeless(events: list[dict]) -> list[dict]:
    def without(event: dict) -> dict:
        return {key: value for key, value in event.items() if key != "seconds"}

    return [
        {**without(event), "clients": [without(row) for row in event["clients"]]}
        for event in events
    ]


class Killed(Exception):
    pass


@one_method
def test_a_run_killed_in_stage_two_resumes_to_the_same_bits(tmp_path, texts, encoder, method):
    def cut(event: dict) -> None:
        if event["kind"] == "round" and event["round"] == 4:
            raise Killed

    experiment = short(texts, encoder, method)
    with pytest.raises(Killed):
        start(experiment, tmp_path / "run", cut)
    torch.manual_seed(5)
    resumed, whole = resume(tmp_path / "run"), start(experiment, tmp_path / "whole")
    # Every number, of the clients' own experts and gates too.
    assert told(resumed) == told(whole)
    events = [timeless(rounds_of(tmp_path / run)) for run in ("run", "whole")]
    assert events[0] == events[1]
    memories = [
        next((tmp_path / run / "checkpoints").glob("round-000004.safetensors")).read_bytes()
        for run in ("run", "whole")
    ]
    assert memories[0] == memories[1]


@pytest.mark.slow
@one_method
def test_two_workers_give_the_bits_of_one(tmp_path, texts, encoder, method):
    one, two = (
        start(short(texts, encoder, method, engine={"workers": n}), tmp_path / str(n))
        for n in (1, 2)
    )
    assert told(one) == told(two)
    events = [timeless(rounds_of(tmp_path / str(n))) for n in (1, 2)]
    assert events[0] == events[1]


@pytest.mark.slow
@each_method
def test_a_language_models_gates_are_the_same_with_two_workers(tmp_path, texts, method):
    data = {
        "path": str(texts),
        "task": "causal-lm",
        "partition": "iid",
        "num_clients": 4,
        "sequence_length": 12,
        "test": 0.2,
        "validation": 0.2,
    }
    options = {"n_layer": 2, "n_embd": 32, "n_head": 4, "resid_pdrop": 0.0}
    options |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = {"name": "lora", "rank": 2, "alpha": 4.0, "config": "gpt2", "options": options}
    settings = {"data": data, "model": model, "clients_per_round": 4}
    one, two = (
        start(
            short(texts, texts, method, **settings, engine={"workers": n}),
            tmp_path / str(n),
        )
        for n in (1, 2)
    )
    assert told(one) == told(two)
    events = [timeless(rounds_of(tmp_path / str(n))) for n in (1, 2)]
    assert events[0] == events[1]
    shares = one["own_share"]
    assert len(shares) == len(one["accuracy_personal"]) == 4
    assert all(0.0 < share < 1.0 for share in shares) and len(set(shares)) > 1


def test_a_run_says_who_adapted_what_and_what_the_gates_say(tmp_path, texts, encoder):
    experiment = short(texts, encoder, PLATEAU, clients_per_round=4, rounds=6)
    summary = start(experiment, tmp_path / "run")
    assert len(summary["accuracy_personal"]) == len(summary["own_share"]) == 4
    assert all(0.0 < share < 1.0 for share in summary["own_share"])
    events = rounds_of(tmp_path / "run")
    # Two rounds are a plateau: 1, 1, 2, and anew in stage two.
    active = [{row["active_blocks"] for row in event["clients"]} for event in events]
    assert active == [{1}, {1}, {2}, {1}, {1}, {2}]
    rows = [row for event in events for row in event["clients"]]
    assert all(0.0 <= row["validation_accuracy"] <= 1.0 for row in rows)
    own_gate = 2 * 32 + 2
    assert [event["clients"][0]["trained_entries"] for event in events] == [
        BLOCK + HEAD,
        BLOCK + HEAD,
        2 * BLOCK + HEAD,
        BLOCK + HEAD + GATE + own_gate,
        BLOCK + HEAD + GATE + own_gate,
        2 * BLOCK + HEAD + GATE + own_gate,
    ]
    assert summary["params_trained"] == 2 * BLOCK + HEAD + GATE + own_gate
    assert summary["trainable_share"] == summary["params_trained"] / summary["params_frozen"]
    # Active adapters; the global expert and the gate; the gate alone.
    down = [{row["bytes_down"] for row in event["clients"]} for event in events]
    first = 4 * (EXPERT + GATE)
    sizes = [4 * (BLOCK + HEAD), 4 * (BLOCK + HEAD), 4 * (2 * BLOCK + HEAD), first]
    assert down == [{size} for size in (*sizes, 4 * GATE, 4 * GATE)]
    up = [{row["bytes_up"] for row in event["clients"]} for event in events]
    assert up == [{size} for size in (*sizes[:3], *[4 * GATE] * 3)]
    # In stage two no factors are averaged.
    assert ["aggregation_error" in event for event in events] == [True] * 3 + [False] * 3
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Adapters on a frozen model" in page
    for figure in ("blocks", "validation", "gates"):
        assert f'aria-label="{figure}"' in page
    assert f"A client trained at most {summary['params_trained']:,}" in page


def test_own_experts_and_the_global_one_learn(tmp_path, texts, encoder):
    learning = {"training": {"lr": 0.3, "batch_size": 8}, "clients_per_round": 4, "rounds": 10}
    for name in ("fedfmsl", "pfl_moe"):
        summary = start(short(texts, encoder, METHODS[name], **learning), tmp_path / name)
        assert summary["accuracy"] > 0.9
        assert min(summary["accuracy_personal"]) > 0.9


def test_in_stage_two_pfl_moe_sends_the_expert_once(tmp_path, texts, encoder):
    start(short(texts, encoder, METHODS["pfl_moe"]), tmp_path / "run")
    seen: set[int] = set()
    for event in rounds_of(tmp_path / "run"):
        for row in event["clients"]:
            second = event["round"] > 2
            assert row["bytes_up"] == (0 if second else 4 * EXPERT)
            assert row["bytes_down"] == (0 if second and row["client"] in seen else 4 * EXPERT)
            if second:
                seen.add(row["client"])
    assert len(seen) > 2


ALL = {**PLATEAU, "schedule": "all"}


def peaks(texts: Path, encoder: Path) -> list[float]:
    """MiB that training one, two and three blocks takes."""
    setup = prepare(short(texts, encoder, ALL))
    costs, whole = setup.costs(), setup.model.whole()
    return [
        costs.of_part(whole, setup.model.adapted(blocks)).peak_bytes / 2**20 for blocks in (1, 2, 3)
    ]


def test_memory_limits_who_adapts_how_much(tmp_path, texts, encoder, capsys):
    one, two, three = peaks(texts, encoder)
    assert one < two < three
    memory = [(one + two) / 2, three, (two + three) / 2]
    experiment = short(texts, encoder, ALL, client_memory_mib=memory, clients_per_round=4, rounds=2)
    setup = prepare(experiment)
    assert [client.depth for client in setup.clients] == [1, 3, 2, 1]
    start(experiment, tmp_path / "run")
    for event in rounds_of(tmp_path / "run"):
        assert not event["failures"]
        assert [row["active_blocks"] for row in event["clients"]] == [1, 3, 2, 1]
        work = [row["flops"] / row["examples"] for row in event["clients"]]
        assert work[0] < work[2] < work[1]
    (tmp_path / "mine.json").write_text(json.dumps(to_json(experiment)))
    main(["plan", str(tmp_path / "mine.json")])
    text = " ".join(capsys.readouterr().out.split())
    frozen = sum(p.numel() for p in transformers.BertModel.from_pretrained(encoder).parameters())
    assert f"{frozen:,} frozen numbers" in text
    assert f"{EXPERT:,}, that is {EXPERT / frozen:.3%}" in text
    assert "NO" not in text.split()


def test_time_limits_who_adapts_how_much(tmp_path, texts, encoder):
    setup = prepare(short(texts, encoder, ALL))
    costs, whole = setup.costs(), setup.model.whole()
    each = [costs.of_part(whole, setup.model.adapted(blocks)) for blocks in (1, 2, 3)]
    work = [16e-9 * (cost.flops_per_example + 2 * cost.forward_flops_per_example) for cost in each]
    assert {client.num_examples for client in setup.clients} == {16}
    speeds = {"client_seconds": 2.0, "client_gflops": [work[0] / 2, work[1] / 1.99]}
    start(short(texts, encoder, ALL, **speeds, rounds=2, clients_per_round=4), tmp_path / "run")
    for event in rounds_of(tmp_path / "run"):
        assert [row["active_blocks"] for row in event["clients"]] == [1, 2, 1, 2]
    slow = {"client_seconds": 2.0, "client_gflops": [work[0] / 2.01]}
    with pytest.raises(CapacityError, match="client 0 can train not even the adapters of one"):
        start(short(texts, encoder, ALL, **slow), tmp_path / "slow")
    assert not (tmp_path / "slow").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"client_seconds": 1.0}, "go together"),
        ({"client_gflops": [1.0]}, "go together"),
        ({"client_seconds": 0.0, "client_gflops": [1.0]}, "client_seconds must be positive"),
        ({"client_seconds": 1.0, "client_gflops": [1.0, 0.0]}, "client_gflops must be positive"),
    ],
)
def test_speeds_and_times_that_cannot_be_are_refused(texts, encoder, changes, message):
    with pytest.raises(ConfigError, match=message):
        short(texts, encoder, ALL, **changes)


def test_a_plateau_without_validation_examples_is_refused(tmp_path, texts, encoder):
    experiment = short(texts, encoder, PLATEAU)
    without = replace(experiment, data=replace(experiment.data, validation=0.0))
    with pytest.raises(ConfigError, match=r"set data\.validation, for instance to 0\.1, or method"):
        start(without, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    calendar = replace(without, method=replace(without.method, schedule="linear"), rounds=1)
    start(calendar, tmp_path / "calendar")


def rows_on(data: DataSettings | None, **changes: object) -> dict[str, Experiment]:
    named = EXPERIMENTS["paper_fedfmsl"]
    assert named.rows is not None
    return dict(named.rows(replace(named.base(data), **changes), frozenset()))


SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def smaller(options: dict[str, object]) -> dict[str, object]:
    return {k: SIZES[k.split(".")[-1]] for k in options if k.split(".")[-1] in SIZES}


def started(rows: dict[str, Experiment], folder: Path, **changes: object) -> None:
    for label, row in rows.items():
        model = replace(row.model, options=row.model.options | smaller(row.model.options))
        data = replace(row.data, num_clients=3, partition="iid", alpha=1.0, max_train=120)
        sizes = {"rounds": 2, "clients_per_round": 3, "training": replace(row.training, lr=0.01)}
        summary = start(
            replace(row, model=model, data=replace(data, **changes), **sizes), folder / label
        )
        assert summary["rounds"] == 2
        has_own = hasattr(row.method, "personal")
        assert ("accuracy_personal" in summary) is has_own
        mixes = summary["method"] in ("fedfmsl", "pfl_moe")
        assert ("own_share" in summary) is mixes


@pytest.mark.slow
def test_the_papers_rows_run_on_texts(tmp_path, texts):
    rows = rows_on(DataSettings(path=texts))
    assert rows["promptfl"].model.config == "bert"
    started(rows, tmp_path, sequence_length=12, max_train=None)


@pytest.mark.slow
def test_the_papers_rows_run_on_images(tmp_path):
    rows = rows_on(None)
    assert len(rows) == 9 + 15
    chosen = ("fedfmsl", "promptfl", "fedclip", "pfl_moe", "ablation-from-input")
    started({label: rows[label] for label in chosen}, tmp_path)


def test_the_command_says_what_own_models_reach(tmp_path, texts, encoder, capsys):
    experiment = short(texts, encoder, ALL, clients_per_round=4, rounds=2)
    (tmp_path / "mine.json").write_text(json.dumps(to_json(experiment)))
    main(["run", str(tmp_path / "mine.json"), "--out", str(tmp_path / "run")])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    own = summary["accuracy_personal"]
    text = " ".join(capsys.readouterr().out.split())
    assert f"their own models reach {sum(own) / len(own):.4f} on average" in text
