"""What clients reach on their own test examples, each with a model of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from tesserafl.core.answers import check_update
from tesserafl.core.errors import ConfigError, MessageError, UpdateError
from tesserafl.core.messages import Client, Memory, Task, Update
from tesserafl.core.method import Method, Predictor, State
from tesserafl.core.model import Model
from tesserafl.core.params import Params
from tesserafl.core.submodel import cut
from tesserafl.core.wire import Parts
from tesserafl.data.examples import Examples
from tesserafl.engines.compression import apart
from tesserafl.engines.federation import Federation
from tesserafl.engines.orders import Judged
from tesserafl.engines.seam import Done, Engine
from tesserafl.run.evaluate import Evaluator
from tesserafl.run.setup import Setup, evaluator_of

Judging = Callable[[Parts], Mapping[int, Judged]]
"""Measures the models of clients elsewhere, by a global state: client -> what it found. Who is not
there is left out."""


def check_personal(setup: Setup) -> None:
    """Raise ConfigError if clients lack the examples that something is to be measured on."""
    experiment = setup.experiment
    validated = any(len(c.validation) for c in setup.data.clients)
    if setup.data.elsewhere:  # what devices keep of their data for that, the settings say
        validated = experiment.data.validation > 0
    if experiment.finetune_epochs and not any(len(c.test) for c in setup.data.clients):
        raise ConfigError(
            "finetune_epochs is for the clients' own test examples, and they have none; set "
            "data.test, for instance to 0.2"
        )
    if getattr(experiment.method, "validates", False) and not validated:
        raise ConfigError(
            "the method goes by what clients reach on validation examples of their own, and they "
            "have none; set data.validation, for instance to 0.1, or method.schedule to another"
        )
    if experiment.finetune_epochs and hasattr(experiment.method, "personal"):
        raise ConfigError(
            "finetune_epochs trains the global model on; clients of this method have models of "
            "their own, which are tested as accuracy_personal: set finetune_epochs to 0"
        )
    if experiment.finetune_epochs and _leaves_out(experiment.method, setup.model):
        raise ConfigError(
            "finetune_epochs is for clients that hold the whole model; set method.ratio to 1 "
            "(adapters of fewer ranks are whole models too) and method.depth to all blocks"
        )


def personal_accuracies(
    setup: Setup,
    engine: Engine,
    federation: Federation,
    evaluator: Evaluator,
    judge: Judging | None = None,
) -> dict[str, list[float]]:
    """Accuracies of the clients that have a test of their own, in the clients' order.

    `accuracy_personal`: with what the method's clients keep (`personal`); of mixtures also
    `own_share`, how much the client's own expert counts there. `accuracy_finetuned`: the global
    model after `finetune_epochs` of training on the client's own examples.

    `judge`: where what clients keep, and what they test with, is on devices; None: it is here.
    """
    method, found = setup.experiment.method, {}
    state = federation.assembled()
    if judge is not None:
        return _elsewhere(setup, judge, state)
    tested = [c for c in setup.clients if len(setup.data.clients[c.id].test)]
    if tested and hasattr(method, "personal"):
        models = [
            method.personal(setup.model, state, apart(engine.memories.get(client.id, {}))[0])
            for client in tested
        ]
        own = list(zip(tested, models, strict=True))
        found["accuracy_personal"] = [_accuracy(setup, evaluator, *pair) for pair in own]
        shares = [evaluator.share(model, setup.data.clients[c.id].test) for c, model in own]
        if any(share is not None for share in shares):
            found["own_share"] = [0.0 if share is None else share for share in shares]
    if tested and setup.experiment.finetune_epochs:
        tuned = _finetuned(setup, engine, tested, state)
        by_client = {c.id: _accuracy(setup, evaluator, c, own) for c, own in tuned}
        found["accuracy_finetuned"] = [by_client[client.id] for client in tested]
    return found


def state_parts(state: State) -> Parts:
    """A state as plain values and groups of tensors, for clients elsewhere."""
    values: dict[str, Any] = {"round": state.round, "rounds": state.rounds, "seed": state.seed}
    values["notes"] = dict(state.notes)
    return values, {"params": state.params, "extra": dict(state.extra)}


def state_of(parts: Parts) -> State:
    """The inverse of `state_parts`; raises MessageError."""
    header, groups = parts
    try:
        return State(params=groups["params"], extra=groups["extra"], **header)
    except (KeyError, TypeError) as error:
        raise MessageError(f"a global state lacks {error}, or has it in excess") from error


def personal_accuracy(
    setup: Setup, parts: Parts, memory: Memory, examples: Examples
) -> tuple[float, float | None]:
    """Accuracy of a client's own model, and of mixtures how much its own expert counts.

    Raises:
        MessageError: the parts are not those of a state.
    """
    method = setup.experiment.method
    if not hasattr(method, "personal"):
        raise MessageError("clients of this method have no models of their own")
    state = state_of(parts)
    model = method.personal(setup.model, state, apart(memory)[0])
    evaluator = evaluator_of(setup)
    return evaluator.evaluate(model, examples).accuracy, evaluator.share(model, examples)


def _elsewhere(setup: Setup, judge: Judging, state: State) -> dict[str, list[float]]:
    """As measured on the devices that are there, in the clients' order."""
    if not hasattr(setup.experiment.method, "personal"):
        return {}
    found_of = judge(state_parts(state))
    judged = [found_of[client] for client in sorted(found_of)]
    if not judged:
        return {}
    found = {"accuracy_personal": [each.accuracy for each in judged]}
    if any(each.share is not None for each in judged):
        found["own_share"] = [0.0 if each.share is None else each.share for each in judged]
    return found


def _is_good(setup: Setup, task: Task, update: Update, large: Params) -> bool:
    try:
        check_update(task, update, large, setup.model)
    except UpdateError:
        return False
    return True


def _leaves_out(method: Method, model: Model) -> bool:
    """Whether some client holds or trains a part of the model only."""
    if min(method.ratio) < 1:
        return not model.low_rank
    depths: tuple[int, ...] = getattr(method, "depth", ())
    return any(min(depths) < depth.blocks for depth in model.depths.values()) if depths else False


def _finetuned(
    setup: Setup, engine: Engine, clients: list[Client], state: State
) -> Iterator[tuple[Client, Predictor]]:
    """Each client's model after training from the global one, at the first round's rate."""
    experiment, whole = setup.experiment, setup.experiment.method.predictor(setup.model, state)
    training = replace(experiment.training, epochs=experiment.finetune_epochs)
    # From the global model: peers' own copies may differ from it.
    for task in experiment.method.configure(setup.model, state, clients, training):
        task = replace(task, wanted=replace(task.wanted, exact=True))  # nothing is sent here
        engine.submit([task])
        (outcome,) = engine.poll()
        if isinstance(outcome, Done) and _is_good(setup, task, outcome.update, state.params):
            params = dict(whole.params)
            for name, delta in outcome.update.delta.items():  # it may report a part of its task
                view = outcome.update.submodel.views[name]
                params[view.name] = params[view.name].clone()
                view.add(params[view.name], delta)
            if hasattr(experiment.method, "factors"):  # what it reports stands for factors
                params |= experiment.method.factors(setup.model, state, outcome.update)
            model = whole.model.resized(task.submodel)
            yield task.client, Predictor(model=model, params=cut(params, task.submodel))
        else:
            yield task.client, whole


def _accuracy(setup: Setup, evaluator: Evaluator, client: Client, own: Predictor) -> float:
    return evaluator.evaluate(own, setup.data.clients[client.id].test).accuracy
