"""Features that a client's frozen parameter sets give for its examples, for its objective.

One client's are computed once for all its examples, or for every batch where an example has no
features of its own. A cohort's are computed once, by vmap over the clients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.func import vmap

from tesserafl.core.errors import ModelError
from tesserafl.core.fit import Fit, Forward
from tesserafl.core.params import Params, aligned
from tesserafl.data.examples import Examples
from tesserafl.engines.batches import augments
from tesserafl.engines.stacking import Given


class References:
    """The references of one client, where it trains.

    Frozen parameters give an example the same features in every epoch, so these are computed once,
    before the first step. Not if batches are augmented, nor with BatchNorm, for which an example's
    features depend on its batch: then they are computed for every batch.
    """

    def __init__(
        self,
        fit: Fit,
        forward: Forward,
        examples: Examples,
        device: str,
        module: nn.Module | None,
    ) -> None:
        self.num_examples = 0
        """Examples of all forward passes so far, over all references."""
        self._forward, self._module, self._device = forward, module, device
        self._params = {
            name: {own: aligned(tensor.detach().to(device)) for own, tensor in params.items()}
            for name, params in fit.references.items()
        }
        self._cached: Params | None = None
        if not augments(fit.training, examples) and not _batch_norms(module):
            parts = [
                self._compute(examples.batch(rows)[0].to(device))
                for rows in torch.split(torch.arange(len(examples)), fit.training.batch_size)
            ]
            self._cached = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            self._params.clear()  # their memory serves the training

    def features(self, rows: Tensor, inputs: Tensor) -> Params:
        """What each reference gives for a batch: name -> [batch, features].

        Args:
            rows: of the client's examples, int64 [batch].
            inputs: what the model is given for them [batch, ...], on the device.
        """
        if self._cached is None:
            return self._compute(inputs)
        rows = rows.to(self._device)
        return {name: features[rows] for name, features in self._cached.items()}

    @torch.no_grad()
    def _compute(self, inputs: Tensor) -> Params:
        self.num_examples += len(self._params) * len(inputs)
        with _without_dropout(self._module):
            return {
                name: features_of(self._forward, params, inputs)
                for name, params in self._params.items()
            }


def features_of(forward: Forward, params: Params, inputs: Tensor) -> Tensor:
    """The features [batch, features] of inputs [batch, ...].

    Raises:
        ModelError: the model returns none.
    """
    features = forward(params, inputs).features
    if features is None:
        raise ModelError(
            "the method compares features, and the model returns logits alone; let the module "
            "return tesserafl.core.model.Output(logits, features), with what goes into its head "
            "as features [batch, features], or choose a model or a method of another kind"
        )
    return features


@torch.no_grad()
def features_together(
    forward: Forward,
    params: Mapping[str, Given],
    pool: Examples,
    counts: Sequence[int],
    size: int,
    device: str,
) -> Tensor:
    """What one reference of many clients gives for the examples of each: [total + 1, features].

    The last row, which stands for padding, is ones: like a real one it has a direction.
    The modules of cohorts have neither dropout nor BatchNorm, so their mode does not matter.

    Args:
        forward: the sub-model as a function of its parameters.
        params: each stacked over the clients (0), or shared by all (None).
        pool: the clients' examples one after another, and one of padding.
        counts: examples of each client; best the largest first.
        size: examples of a client that are computed at once.
        device: where `params` are.

    Raises:
        ModelError: the model returns no features.
    """
    total, most = sum(counts), max(counts)
    firsts = [0, *accumulate(counts)]
    dims = {name: dim for name, (_, dim) in params.items()}
    function = vmap(partial(features_of, forward), in_dims=(dims, 0))
    table: Tensor | None = None
    for start in range(0, most, size):
        lasting = max(rank for rank, count in enumerate(counts) if count > start) + 1
        rows = torch.full((lasting, min(size, most - start)), total)
        for rank, first in enumerate(firsts[:lasting]):
            own = range(start, min(counts[rank], start + size))
            rows[rank, : len(own)] = torch.arange(len(own)) + first + start
        given = {name: t if dim is None else t[:lasting] for name, (t, dim) in params.items()}
        found = function(given, pool.batch(rows)[0].to(device)).flatten(0, 1)
        if table is None:
            table = found.new_ones(total + 1, *found.shape[1:])
        table[rows.reshape(-1).to(device)] = found
    assert table is not None, "a client has no examples"
    table[total] = 1.0  # where the rows that fill up were written to
    return table


@contextmanager
def _without_dropout(module: nn.Module | None) -> Iterator[None]:
    """Everything as it predicts, but BatchNorm, which has no statistics but the batch's yet."""
    if module is None:
        yield
        return
    was_training = module.training
    module.eval()
    for part in _batch_norms(module):
        part.train(was_training)
    try:
        yield
    finally:
        module.train(was_training)


def _batch_norms(module: nn.Module | None) -> list[nn.Module]:
    parts = [] if module is None else module.modules()
    return [part for part in parts if isinstance(part, nn.modules.batchnorm._BatchNorm)]
