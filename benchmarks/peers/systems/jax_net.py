"""The workloads' nets in JAX, on weights in torch's layout."""

from __future__ import annotations

import os
import sys

THREADS = int(sys.argv[sys.argv.index("--threads") + 1]) if "--threads" in sys.argv else 1
CORES = os.sched_getaffinity(0)

# XLA has no option for it: it starts a thread for each core that it may use.
os.sched_setaffinity(0, set(sorted(CORES)[:THREADS]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

jax.devices()  # the threads are started; from here they may run on any core
for thread in os.listdir("/proc/self/task"):
    os.sched_setaffinity(int(thread), CORES)

Params = dict[str, jax.Array]


def logits_of(params: Params, x: jax.Array) -> jax.Array:
    """Convolutions with ReLU and pooling, then linear layers with ReLU between them."""
    names = [name.removesuffix(".weight") for name in params if name.endswith(".weight")]
    for position, name in enumerate(names):
        weight, bias = params[f"{name}.weight"], params[f"{name}.bias"]
        if weight.ndim == 4:
            x = jax.lax.conv_general_dilated(x, weight, (1, 1), "SAME") + bias[:, None, None]
            window = (1, 1, 2, 2)
            x = jax.lax.reduce_window(
                jax.nn.relu(x), -jnp.inf, jax.lax.max, window, window, "VALID"
            )
            continue
        x = x.reshape(len(x), -1) @ weight.T + bias
        if position < len(names) - 1:
            x = jax.nn.relu(x)
    return x


def scores_of(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """Log-probabilities of the labels, one an example."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits_of(params, x)), y[:, None], 1)[:, 0]
