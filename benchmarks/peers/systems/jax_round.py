"""One XLA program per round: a scan over steps of a vmap over clients, all data on the device."""

from __future__ import annotations

from functools import partial

import numpy as np
from common import Bench
from jax_net import Params, jax, jnp, logits_of, scores_of

bench = Bench("jax_round", f"jax {jax.__version__}")
work = bench.workload
x_all, y_all = (jnp.asarray(array) for array in work.padded)
params = {name: jnp.asarray(value) for name, value in work.init.items()}
draw = np.random.default_rng(0)


def loss_of(params: Params, x: jax.Array, y: jax.Array, weights: jax.Array) -> jax.Array:
    """Mean cross-entropy over the examples that are real."""
    return -(weights * scores_of(params, x, y)).sum()


@partial(jax.jit, donate_argnums=0)
def one_round(
    params: Params, cohort: jax.Array, rows: jax.Array, weights: jax.Array, shares: jax.Array
) -> Params:
    """FedAvg of a cohort."""

    def client(client: jax.Array, rows: jax.Array, weights: jax.Array) -> Params:
        x, y = x_all[client], y_all[client]

        def step(params: Params, batch: tuple[jax.Array, jax.Array]) -> tuple[Params, None]:
            rows, weights = batch
            slopes = jax.grad(loss_of)(params, x[rows], y[rows], weights)
            return jax.tree.map(lambda p, g: p - work.lr * g, params, slopes), None

        return jax.lax.scan(step, params, (rows, weights))[0]

    trained = jax.vmap(client)(cohort, rows, weights)
    return jax.tree.map(lambda p: jnp.tensordot(shares, p, 1), trained)


def play(number: int) -> None:
    """Draw the batches, run the program, wait for it."""
    global params
    cohort = work.cohort(number)
    rows, weights = work.batches(cohort, draw)
    params = one_round(params, np.array(cohort), rows, weights, work.shares(cohort))
    jax.block_until_ready(params)


bench.play(play)
bench.finish(
    logits_of(params, jnp.asarray(work.check_set[0])),
    steps=work.batches(work.cohort(0), draw)[0].shape[1],
    note="compiles in the first round",
)
