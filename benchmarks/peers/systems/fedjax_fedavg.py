"""FedJAX: its own federated_averaging, clients one after another in jitted steps."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import fedjax
import numpy as np
from common import Bench
from fedjax.algorithms import fed_avg
from jax_net import jax, jnp, logits_of, scores_of

bench = Bench("fedjax", f"fedjax {version('fedjax')}, jax {jax.__version__}")
work = bench.workload


def loss_of(params: Any, batch: Any, rng: Any) -> Any:
    """Mean cross-entropy."""
    return -scores_of(params, batch["x"], batch["y"]).mean()


# FedJAX fills a batch up from the next epoch: a client with 17 examples is given batches of 18.
algorithm = fed_avg.federated_averaging(
    jax.grad(loss_of),
    fedjax.optimizers.sgd(work.lr),
    fedjax.optimizers.sgd(1.0),
    fedjax.ShuffleRepeatBatchHParams(
        batch_size=min(work.batch, max(work.sizes)),
        num_epochs=None,
        num_steps=work.steps,
        drop_remainder=False,
    ),
)
datasets = [fedjax.ClientDataset({"x": x, "y": y}) for x, y in zip(work.x, work.y, strict=True)]
keys = jax.random.split(jax.random.PRNGKey(0), work.per_round)
state = algorithm.init({name: jnp.asarray(value) for name, value in work.init.items()})


def one_round(number: int) -> None:
    """FedAvg of the round's cohort."""
    global state
    clients = [
        (client, datasets[client], key)
        for client, key in zip(work.cohort(number), keys, strict=True)
    ]
    state, _ = algorithm.apply(state, clients)
    jax.block_until_ready(state.params)


bench.play(one_round)
bench.finish(
    np.asarray(logits_of(state.params, jnp.asarray(work.check_set[0]))),
    steps=work.steps,
    note="batches are always full: examples of small clients repeat",
)
