"""The named experiments as studies: their rows, and what of them the command line may fix."""

from dataclasses import fields, replace

import pytest

from tesserafl.core.errors import ConfigError, ModelError
from tesserafl.data.examples import Spec
from tesserafl.experiments import EXPERIMENTS
from tesserafl.methods import FedIT
from tesserafl.models import HuggingFace
from tesserafl.run.begin import first_federation
from tesserafl.run.setup import prepare
from tesserafl.run.study import start_study


def labels(name: str, *asked: str, ratio: tuple[float, ...] | None = None) -> list[str]:
    named = EXPERIMENTS[name]
    base = named.base(None)
    if ratio:
        base = replace(base, method=replace(base.method, ratio=ratio))
    assert named.rows is not None
    return list(named.rows(base, frozenset(asked)))


def test_the_grid_has_every_cell_and_each_ceiling_once():
    rows = labels("width_grid")
    assert len(rows) == 2 * (1 + 2 * 7)
    assert len(set(rows)) == len(rows)
    assert sum(row.endswith("fedavg-full") for row in rows) == 2


def test_what_the_command_line_fixes_is_not_varied():
    assert len(labels("width_grid", "method.ratio", ratio=(0.5,))) == 2 * 8
    assert len(labels("width_grid", "method.ratio", "data.partition", ratio=(0.5,))) == 8
    fewer = labels("paper_fedbrb", "method.ratio", "data.partition", ratio=(0.5,))
    assert [row for row in fewer if not row.startswith("ablation")] == [
        "dirichlet-fedavg-full",
        "dirichlet-given-fedavg-small",
        "dirichlet-given-heterofl",
        "dirichlet-given-fedrolex",
        "dirichlet-given-fedbrb",
    ]


@pytest.mark.parametrize(
    "name",
    ["width_grid", "paper_fedbrb", "comparison", "lora_comparison", "paper_fedfmsl", "paper_flm"],
)
def test_every_row_of_a_study_can_begin(name):
    named = EXPERIMENTS[name]
    assert named.rows is not None
    rows = named.rows(named.base(None), frozenset())
    setups = {}
    for row in rows.values():
        key = str(row.model)
        setups[key] = setups.get(key) or prepare(row)
        first_federation(replace(setups[key], experiment=row))


def test_a_bad_row_is_refused_before_the_first_is_trained(tmp_path):
    named = EXPERIMENTS["comparison"]
    base = named.base(None)
    assert named.rows is not None
    rows = named.rows(replace(base, method=replace(base.method, ratio=(0.3,))), frozenset())
    with pytest.raises(ConfigError, match="1 over a whole number"):
        start_study(rows, tmp_path / "study", lambda *_: None)
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("config", ["bert", "gpt2"])
def test_a_language_model_does_not_see_what_it_is_to_predict(config):
    import torch

    spec = Spec(
        kind="tokens",
        task="causal-lm",
        shape=(8,),
        num_classes=16,
        class_names=(),
        vocab_size=16,
        pad_id=15,
    )
    options = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = HuggingFace(config=config, options=options).build_model(spec)
    module = model.module().eval()
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    other = torch.tensor([[1, 2, 3, 4, 9]])
    with torch.no_grad():
        assert torch.allclose(module(tokens).logits[:, :4], module(other).logits[:, :4], atol=1e-5)
        assert not torch.allclose(module(tokens).logits[:, 4], module(other).logits[:, 4])


def test_a_model_that_looks_ahead_is_refused(monkeypatch):
    from tesserafl.models import huggingface

    spec = Spec(
        kind="tokens",
        task="causal-lm",
        shape=(8,),
        num_classes=16,
        class_names=(),
        vocab_size=16,
        pad_id=15,
    )
    fit = huggingface.fit_to_data

    def forgetful(config, spec, source):
        fit(config, spec, source)
        config.is_decoder = False

    monkeypatch.setattr(huggingface, "fit_to_data", forgetful)
    options = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    with pytest.raises(ModelError, match="sees the tokens"):
        HuggingFace(config="bert", options=options).build_model(spec)


def test_every_row_of_the_serverless_study_can_begin():
    """Rows of other numbers of clients need data of their own."""
    named = EXPERIMENTS["paper_msfusion"]
    base = named.base(None)
    rows = named.rows(base, frozenset())
    assert len(rows) == 9 * (2 + 3 * 7) + 4 + 13 + 5
    with_momentum = replace(base, training=replace(base.training, momentum=0.9))
    assert "ablation-momentum-carried" in named.rows(with_momentum, frozenset())
    setups = {}
    for row in rows.values():
        key = (row.data.num_clients, row.data.partition)
        if key not in setups:
            setups[key] = prepare(row)
        first_federation(replace(setups[key], experiment=row))


def test_the_command_line_fixes_widths_and_participants_of_the_serverless_study():
    named = EXPERIMENTS["paper_msfusion"]
    base = named.base(None)
    five = replace(base, data=replace(base.data, num_clients=5, partition="iid"))
    rows = named.rows(five, frozenset({"data.num_clients", "data.partition", "method.ratio"}))
    assert {row.data.num_clients for row in rows.values()} == {5}
    assert {row.clients_per_round for row in rows.values()} == {5}
    cells = [label for label in rows if not label.startswith(("ablation", "network"))]
    assert len(cells) == 2 + 7 and all(label.startswith("iid-5-") for label in cells)
    with pytest.raises(ConfigError, match="leave --method away"):
        named.rows(EXPERIMENTS["comparison"].base(None), frozenset())


def test_the_adapters_study_chooses_its_methods():
    named = EXPERIMENTS["lora_comparison"]
    rows = named.rows(replace(named.base(None), finetune_epochs=3), frozenset())
    assert {label: row.finetune_epochs for label, row in rows.items() if row.finetune_epochs} == {
        "fedit": 3
    }
    assert [label for label, row in rows.items() if row.model.merge] == ["unequal-flora"]
    with pytest.raises(ConfigError, match="leave --method"):
        named.rows(named.base(None), frozenset({"method.decay"}))


def test_the_experts_study_takes_its_parts_away_one_by_one():
    named = EXPERIMENTS["paper_fedfmsl"]
    base = named.base(None)
    rows = named.rows(replace(base, finetune_epochs=3), frozenset())
    assert {label: row.finetune_epochs for label, row in rows.items() if row.finetune_epochs} == {
        "fedit": 3
    }
    assert named.rows(base, frozenset())["fedit"].finetune_epochs == 1
    ablations = {label: row for label, row in rows.items() if label.startswith("ablation-")}
    assert len(ablations) == 15
    for row in ablations.values():
        changed = {
            field.name
            for field in fields(base.method)
            if getattr(row.method, field.name) != getattr(base.method, field.name)
        }
        assert changed and replace(row, method=base.method) == replace(base, finetune_epochs=0)
        assert len(changed) == 1 or changed == {"own", "balance"}
    assert len({str(row.method) for row in ablations.values()} | {str(base.method)}) == 16
    for changes in ({"method": FedIT()}, {"model": HuggingFace()}):
        with pytest.raises(ConfigError, match="leave --method and --model away"):
            named.rows(replace(base, **changes), frozenset())
