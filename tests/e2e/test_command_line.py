"""The command line as a user and a script meet it."""

import json
import sys
from pathlib import Path

import pytest
import torch

from tesserafl.cli import main

QUICK = ["--rounds", "2", "--data.num-clients", "8", "--clients-per-round", "4"]
TINY = [*QUICK, "--model.hidden", "16", "16"]

SUMMARY = {
    "run",
    "method",
    "rounds",
    "accuracy",
    "accuracy_untrained_zeroed",
    "loss",
    "params_full",
    "params_largest_client",
    "params_trained",
    "coverage",
    "bytes_down",
    "bytes_up",
    "flops",
    "seconds",
    "state_sha256",
}


def last_json(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def failure(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 1) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err + captured.out


@pytest.mark.usefixtures("figures")
def test_quickstart_ends_in_one_json_object_and_a_whole_run_folder(tmp_path, capsys):
    folder = tmp_path / "run"
    main(["run", "quickstart", *TINY, "--out", str(folder), "--json"])
    summary = last_json(capsys)
    assert set(summary) == SUMMARY
    assert summary["params_largest_client"] < summary["params_full"]
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {
        "config.json",
        "events.jsonl",
        "partition.json",
        "partition.png",
        "report.html",
        "summary.json",
        "model/model.json",
        "model/model.safetensors",
        "checkpoints/round-000002.json",
        "checkpoints/round-000002.safetensors",
    }
    assert (folder / "partition.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg viewBox=" in (folder / "report.html").read_text()
    main(["resume", str(folder), "--json"])
    assert last_json(capsys) == summary


def test_a_run_is_repeated_from_its_configuration(tmp_path, capsys):
    main(["run", "quickstart", *TINY, "--seed", "3", "--out", str(tmp_path / "a"), "--json"])
    first = last_json(capsys)
    config = str(tmp_path / "a" / "config.json")
    main(["run", config, "--out", str(tmp_path / "b"), "--json"])
    assert last_json(capsys)["state_sha256"] == first["state_sha256"]
    main(["run", config, "--seed", "4", "--out", str(tmp_path / "c"), "--json"])
    assert last_json(capsys)["state_sha256"] != first["state_sha256"]


def test_the_exported_model_predicts_without_us(tmp_path, capsys):
    from safetensors.torch import load_file

    main(["run", "quickstart", *TINY, "--out", str(tmp_path / "run")])
    tensors = load_file(tmp_path / "run" / "model" / "model.safetensors")
    sizes = json.loads((tmp_path / "run" / "model" / "model.json").read_text())["sizes"]
    assert sizes == {"hidden1": 16, "hidden2": 16, "classes": 10}
    assert tensors["head.weight"].shape == (10, 16)


def test_a_study_runs_every_row_and_compares_them(tmp_path, capsys):
    folder = tmp_path / "study"
    arguments = ["run", "comparison", *TINY, "--rounds", "1", "--method.ratio", "0.5"]
    main([*arguments, "--out", str(folder), "--json"])
    summary = last_json(capsys)
    rows = {row["row"]: row for row in summary["rows"]}
    assert list(rows) == [
        "fedavg-full",
        "fedavg-small",
        "heterofl",
        "federated_dropout",
        "fedrolex",
        "fedecover",
        "fedbrb",
        "msfusion",
    ]
    assert rows["fedavg-full"]["params_largest_client"] == rows["fedbrb"]["params_full"]
    assert (
        rows["fedavg-small"]["params_full"]
        == rows["fedavg-small"]["params_largest_client"]
        == rows["fedbrb"]["params_largest_client"]
    )
    assert "fedrolex" in (folder / "comparison.md").read_text()
    # What is missing of a study is run by resume; what is there is kept.
    (folder / "summary.json").unlink()
    kept = (folder / "fedrolex" / "summary.json").stat().st_mtime_ns
    main(["resume", str(folder), "--json"])
    assert last_json(capsys) == summary
    assert (folder / "fedrolex" / "summary.json").stat().st_mtime_ns == kept


def test_plan_shows_what_fits_and_how_coverage_grows(capsys):
    arguments = ["plan", "quickstart", *TINY, "--rounds", "20", "--method.ratio", "0.5", "0.25"]
    main([*arguments, "--client-memory-mib", "100", "0.001", "--json"])
    plan = last_json(capsys)
    assert [kind["num_clients"] for kind in plan["classes"]] == [4, 4]
    assert plan["classes"][0]["peak_bytes"] < plan["classes"][0]["memory_bytes"]
    assert plan["classes"][1]["peak_bytes"] > plan["classes"][1]["memory_bytes"]
    shares = list(plan["coverage"].values())
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    main(arguments)
    assert "Coverage" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["methods", "models", "data", "experiments"])
def test_list(what, capsys):
    main(["list", what])
    assert len(capsys.readouterr().out.splitlines()) >= 3


def test_help_and_version(capsys):
    main(["--help"])
    assert "tessera run" in capsys.readouterr().out
    main(["--version"])
    assert capsys.readouterr().out.startswith("tessera ")


def test_doctor(capsys):
    main(["doctor"])
    assert "torch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["rum"], 2, ["'run'"]),
        (["run", "quikstart"], 1, ["'quickstart'"]),
        (["run", "quickstart", "--rouns", "3"], 2, ["--rounds"]),
        (["run", "quickstart", "--method", "fedbrp"], 1, ["'fedbrb'"]),
        (["run", "quickstart", "--method.ratio", "1.5"], 1, ["1.5", "(0, 1]"]),
        (["run", "quickstart", "--method.ratio", "0.3"], 1, ["1 over a whole number"]),
        (["run", "quickstart", "--method.ratio", "0.333333333"], 1, ["256 units", "1/2, 1/4"]),
        (["run", "quickstart", "--method.ratio", "1.0"], 1, ["smaller than the model"]),
        (["run", "quickstart", "--rounds", "0"], 1, ["at least 1"]),
        (["run", "quickstart", "--training.lr", "0"], 2, ["training.lr"]),
        (["run", "quickstart", "--data.partition", "dirichlt"], 2, ["dirichlet"]),
        (["run", "quickstart", "--clients-per-round", "21"], 1, ["only 20 clients"]),
        (["run", "quickstart", "--data.path", "nowhere"], 1, ["nowhere"]),
        (["run", "quickstart", "--model", "cnn", "--client-memory-mib", "0.01"], 1, ["MiB"]),
        (["run", "quickstart", "--engine.device", "cuda"], 1, ["GPU"]),
        (["run", "paper_fedbrb", "--method", "heterofl"], 1, ["comparison"]),
        (["run", "nothing.toml"], 1, ["nothing.toml"]),
        (["list", "method"], 2, ["'methods'"]),
        (["resume", "nowhere"], 1, ["run folder"]),
        (["compare", "nowhere"], 1, ["nowhere"]),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(
    tmp_path, monkeypatch, capsys, arguments, code, words
):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    text = " ".join(failure(capsys, *arguments, code=code).split())
    for word in words:
        assert word in text
    assert list(tmp_path.iterdir()) == []


def test_a_toml_file_with_an_unknown_key(tmp_path, capsys):
    file = tmp_path / "mine.toml"
    file.write_text('roundz = 3\n[method]\nname = "fedavg"\n')
    assert "'rounds'" in failure(capsys, "run", str(file))
    file.write_text("rounds = 3\n[training]\nlearning_rate = 1\n")
    assert "training.learning_rate" in failure(capsys, "run", str(file))
    file.write_text("rounds = three\n")
    assert "TOML" in failure(capsys, "run", str(file))
    file.write_text('rounds = "three"\n')
    assert "'three'" in failure(capsys, "run", str(file))


def test_settings_of_a_file_and_of_the_command_line_meet(tmp_path, capsys):
    file = tmp_path / "mine.toml"
    file.write_text(
        "rounds = 2\nclients_per_round = 4\n[data]\nnum_clients = 8\n"
        '[method]\nname = "heterofl"\nratio = [0.5, 0.25]\n'
        '[model]\nname = "mlp"\nhidden = [16]\n'
    )
    main(["run", str(file), "--rounds", "1", "--out", str(tmp_path / "run"), "--json"])
    summary = last_json(capsys)
    assert (summary["method"], summary["rounds"]) == ("heterofl", 1)


def test_vectors_with_a_label_column_of_another_name(tmp_path, capsys):
    rows = ["a,b,target"] + [f"{i % 7},{i % 3},{i % 2}" for i in range(80)]
    (tmp_path / "train.csv").write_text("\n".join(rows))
    arguments = ["run", "quickstart", "--data.path", str(tmp_path), "--data.label-column", "target"]
    sizes = ["--data.num-clients", "4", "--clients-per-round", "2", "--rounds", "1"]
    main([*arguments, *sizes, "--data.partition", "iid", "--out", str(tmp_path / "r"), "--json"])
    assert last_json(capsys)["rounds"] == 1


@pytest.mark.parametrize("task", ["text-classification", "causal-lm"])
def test_texts_train_and_load_with_transformers_alone(tmp_path: Path, capsys, task):
    import pyarrow as pa
    import transformers
    from pyarrow import parquet

    texts = [f"{'good' if i % 2 else 'bad'} film number {i}" for i in range(64)]
    table = pa.table({"text": texts, "label": [i % 2 for i in range(64)]})
    parquet.write_table(table, tmp_path / "train.parquet")
    config, options = ("bert", "num_hidden_layers") if "text" in task else ("gpt2", "n_layer")
    settings = {
        "rounds": 1,
        "clients_per_round": 2,
        "data": {
            "path": str(tmp_path),
            "task": task,
            "partition": "iid",
            "num_clients": 4,
            "sequence_length": 16,
        },
        "model": {
            "name": "huggingface",
            "config": config,
            "options": {options: 1, "hidden_size": 32, "num_attention_heads": 4},
        },
        "method": {"name": "fedbrb", "ratio": [0.5]},
    }
    if "text" in task:
        settings["model"]["options"]["intermediate_size"] = 64
    (tmp_path / "mine.json").write_text(json.dumps(settings))
    main(["run", str(tmp_path / "mine.json"), "--out", str(tmp_path / "run"), "--json"])
    summary = last_json(capsys)
    assert summary["params_largest_client"] < summary["params_full"]
    kind = "SequenceClassification" if "text" in task else "CausalLM"
    auto = getattr(transformers, f"AutoModelFor{kind}")
    model = auto.from_pretrained(tmp_path / "run" / "model")
    assert sum(p.numel() for p in model.parameters()) == summary["params_full"]
    assert sys.modules["tesserafl"]  # it is loaded here, but from_pretrained did not need it
