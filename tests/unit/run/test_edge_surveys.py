"""Models of clients' own below edges: they stay on devices, and are measured there."""

from __future__ import annotations

import edges_at_hand
import pytest
from devices_at_hand import prepare_once
from edges_at_hand import TreeAtHand, at_once, events_of, simulated

from tesserafl.core.errors import MessageError
from tesserafl.core.fit import Training
from tesserafl.data import DataSettings
from tesserafl.engines.orders import Answer, Judged, order_of, reply_of, sealed
from tesserafl.engines.parcels import Outgoing
from tesserafl.engines.steps import Told
from tesserafl.methods import FedFMSL, FedSALoRA, Local, PFLMoE
from tesserafl.models import MLP, LoRA
from tesserafl.run import deployed, runner
from tesserafl.run.deployed import serve_over
from tesserafl.run.experiment import EngineSettings, Experiment
from tesserafl.run.surveying import Surveying

VIT = {
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 16,
    "image_size": 8,
    "patch_size": 4,
    "initializer_range": 0.3,
}
ADAPTERS = LoRA(config="vit", options=VIT, rank=2, alpha=4.0)
OWN = [
    (Local(), MLP(hidden=(16,))),
    (FedSALoRA(), ADAPTERS),
    (PFLMoE(), ADAPTERS),
    (FedFMSL(start=1, step=1, patience=2), ADAPTERS),
]


@pytest.fixture(autouse=True)
def _prepared_once(monkeypatch):
    prepare_once(monkeypatch)
    for module in (runner, edges_at_hand):
        monkeypatch.setattr(module, "prepare", deployed.prepare)
    for name in ("write_report", "export_model"):  # others test these
        monkeypatch.setattr(runner, name, lambda *_: None)


def _experiment(method=OWN[0][0], model=OWN[0][1], **changes):
    settings = {
        "data": DataSettings(
            num_clients=4, max_train=160, max_test=50, test=0.3, validation=0.2, partition="iid"
        ),
        "model": model,
        "method": method,
        "training": Training(lr=0.3, batch_size=8),
        "engine": EngineSettings(batching="sequential"),
        "rounds": 4,
        "clients_per_round": 4,
    }
    return Experiment(**(settings | changes))


@pytest.mark.parametrize(("method", "model"), OWN, ids=[type(m).__name__ for m, _ in OWN])
def test_own_models_are_measured_below_edges_as_in_this_process(tmp_path, method, model):
    experiment, tree = _experiment(method, model), TreeAtHand(folder=tmp_path)
    here = simulated(experiment, 2, tmp_path / "here")
    served = serve_over(tree.post, tree.begin(experiment), watch=at_once)
    for key in ("state_sha256", "accuracy", "bytes_up", "bytes_down", "accuracy_personal"):
        assert served[key] == here[key], key
    assert len(served["accuracy_personal"]) == 4
    assert served.get("own_share") == here.get("own_share")
    assert not any(event["failures"] for event in events_of(tmp_path / "served"))


def test_models_of_their_own_go_on_after_any_end(tmp_path):
    """The cloud is cut off after a round that it has not saved; an edge starts anew twice."""
    experiment, tree = _experiment(), TreeAtHand(folder=tmp_path)
    here = simulated(experiment, 2, tmp_path / "here")

    class Cut(Exception):
        pass

    def listen(event):
        if event["kind"] == "round":
            tree.restart(200)
            if event["round"] == 3:
                raise Cut

    folder = tree.begin(experiment)
    with pytest.raises(Cut):
        serve_over(tree.post, folder, listen, at_once)
    trained = tree.orders("work")
    tree.restart(201)
    served = serve_over(tree.post, folder, watch=at_once)
    assert served["accuracy_personal"] == here["accuracy_personal"]
    assert tree.orders("work") == trained + 4


def test_who_is_away_or_lies_is_left_out_of_what_is_measured(tmp_path):
    experiment = _experiment(rounds=1)
    here = simulated(experiment, 2, tmp_path / "here")["accuracy_personal"]
    tree = TreeAtHand(folder=tmp_path / "away")

    def gone(event):
        if event["kind"] == "round":
            tree.posts[200].away = {101}

    served = serve_over(tree.post, tree.begin(experiment), gone, at_once)
    assert served["accuracy_personal"] == [here[0], *here[2:]]

    tree = TreeAtHand(folder=tmp_path / "lies")
    honest = tree.post.residents[201]

    class Liar:
        name = honest.name

        def answer(self, envelope):
            if order_of(envelope).kind != "survey":
                return honest.answer(envelope)
            assert reply_of(honest.answer(envelope)).kind in ("answer", "missing")
            judged = [{"client": client, "accuracy": 1.0, "share": None} for client in (0, 3)]
            letter = Outgoing(parts=({"judged": judged}, {})).letter
            return sealed(Answer(letter=letter.model_dump(), seconds=0.1))

    tree.post.residents[201] = Liar()
    served = serve_over(tree.post, tree.begin(experiment), watch=at_once)
    assert served["accuracy_personal"] == here[:2]


def test_an_edge_tells_of_its_own_clients_each_once():
    asked = Surveying(numbers={"a": 2, "b": 5}, heard={5: 7, 9: 7}, seconds=60.0)
    assert asked.order("a" * 32, Outgoing(parts=({}, {})).letter, 10).heard == [[5, 7]]

    def told(*judged):
        return Told(client=0, parts=({"judged": list(judged)}, {}), seconds=1.0)

    good = {"client": 5, "accuracy": 0.5, "share": None}
    assert asked.judged(told(good)) == {5: Judged(accuracy=0.5, share=None)}
    for wrong in ((good, good), ({**good, "client": 9},), ({**good, "accuracy": 1.5},), ({},)):
        with pytest.raises(MessageError):
            asked.judged(told(*wrong))
