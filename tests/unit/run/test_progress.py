"""What a run says while it works, without a terminal."""

from tesserafl.run.experiment import Experiment, to_json
from tesserafl.run.progress import Progress


def events(rounds: int, batching: str) -> list[dict[str, object]]:
    experiment = to_json(Experiment(rounds=rounds))
    experiment["engine"]["batching"] = batching
    counted = [
        {"kind": "round", "round": n, "loss": 0.5, "bytes_down": 1_000_000, "bytes_up": 500_000}
        for n in range(1, rounds + 1)
    ]
    counted.insert(1, {"kind": "evaluate", "round": 1, "accuracy": 0.25})
    return [{"kind": "start", "experiment": experiment}, *counted]


def test_plain_lines_say_how_clients_train_and_how_far_it_is(capsys) -> None:
    with Progress() as progress:
        for event in events(3, "vmapped"):
            progress.listen(event)
    first, *rounds = capsys.readouterr().out.splitlines()
    assert first == "clients train many in one program (engine.batching vmapped)"
    assert [line.split("  ")[0] for line in rounds] == ["round 1/3", "round 2/3", "round 3/3"]
    assert "accuracy 0.2500" in rounds[1] and "1.5 MB" in rounds[1]


def test_a_long_run_takes_ten_lines(capsys) -> None:
    with Progress() as progress:
        progress.announce("fedbrb", 2, 7)
        for event in events(200, "sequential"):
            progress.listen(event)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[2/7 fedbrb]"
    assert len(lines) == 12 and lines[-1].startswith("round 200/200")


def test_a_round_without_an_answer_has_no_loss(capsys) -> None:
    start, first, *_ = events(1, "sequential")
    with Progress() as progress:
        progress.listen(start)
        progress.listen({**first, "loss": None})
    assert "loss -" in capsys.readouterr().out
