"""Lower blocks that a fit does not train: their hidden states are computed once and kept.

A client that trains only the adapters of the top blocks gets the same hidden states below them in
every step, epoch and round, until a parameter there changes. They are computed in the examples'
order, in parts of one size, so that their bits do not depend on when or where that is done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import torch
from torch import Tensor, nn

from tesserafl.core.fit import Fit, Forward
from tesserafl.core.model import Output
from tesserafl.core.params import Params
from tesserafl.data.examples import Examples
from tesserafl.engines.batches import augments
from tesserafl.engines.kept import Shelf, digests_of, joined, rows_of
from tesserafl.engines.optimisers import trained_names
from tesserafl.models.split import Tower, cuts_of, hidden_of, replayed, towers_of


class Frozen:
    """The hidden states of a set of examples, and the forward pass that starts from them."""

    def __init__(
        self,
        forward: Forward,
        module: nn.Module,
        hidden: Mapping[Tower, Tensor],
        below: Mapping[str, str],
    ) -> None:
        self._forward, self._module, self._hidden, self._below = forward, module, hidden, below

    def serves(self, digests: Mapping[str, str]) -> bool:
        """Whether a whole set of parameters is equal to that of the hidden states, below.

        Args:
            digests: `digests_of` the set.
        """
        return all(digests[name] == own for name, own in self._below.items())

    def at(self, rows: Tensor, inputs: Tensor, params: Params) -> Forward:
        """The model as a function, for one batch.

        For other inputs than these very ones, or other parameters in the lower blocks, it computes
        all of the model.

        Args:
            rows: of the examples, int64 [batch].
            inputs: what the model is given for them [batch, ...].
            params: a set that `serves`, on the device.
        """
        hidden = {
            tower: table if tower.constant else rows_of(table, rows)
            for tower, table in self._hidden.items()
        }
        fixed = [(name, params[name]) for name in self._below]

        def forward(asked: Params, given: Tensor) -> Output:
            others = given is not inputs or any(asked[name] is not value for name, value in fixed)
            if others or given.requires_grad:  # the slope in them is wanted
                return self._forward(asked, given)
            with replayed(self._module, hidden):
                return self._forward(asked, given)

        return forward


def frozen_below(
    shelf: Shelf | None,
    fit: Fit,
    forward: Forward,
    module: nn.Module | None,
    examples: Examples,
    params: Params,
    what: str = "train",
) -> Frozen | None:
    """The hidden states below what the fit trains; None: there are none to be kept.

    Args:
        shelf: where they are kept; None: nothing is.
        fit: what is trained.
        forward: the sub-model as a function of its parameters.
        module: what `forward` runs, in training mode.
        examples: of the client.
        params: the fit's, where `forward` runs.
        what: name of these examples among the client's.
    """
    if augments(fit.training, examples):
        return None
    own = {name: tensor.detach() for name, tensor in params.items() if name not in fit.beside}
    trained = {*trained_names(fit), *fit.rebuilt} - fit.beside
    size = fit.training.batch_size
    return kept_below(shelf, forward, module, examples, own, fit.params, trained, size, what)


def kept_below(
    shelf: Shelf | None,
    forward: Forward,
    module: nn.Module | None,
    examples: Examples,
    own: Params,
    source: Mapping[str, Tensor],
    trained: Set[str],
    size: int,
    what: str,
) -> Frozen | None:
    """The hidden states below what changes; None: there are none to be kept.

    Args:
        shelf: where they are kept; None: nothing is.
        forward: the model as a function of its parameters.
        module: what `forward` runs, in the mode in which the states are read again.
        examples: whose states.
        own: all parameters of the model, where `forward` runs.
        source: the same, wherever it is best to look at their bytes.
        trained: names of those that will change; nothing that depends on them is kept.
        size: examples of a batch.
        what: name of these examples among the client's.
    """
    if shelf is None or module is None or not shelf.kept.most_bytes or not len(examples):
        return None
    cuts = cuts_of(module, shelf.prefixes, trained)
    if not cuts:
        return None
    device, key = next(iter(own.values())).device, shelf.cut_key(cuts)
    if key not in shelf.kept.towers:
        inputs = _two(examples).to(device)
        shelf.kept.towers[key] = towers_of(module, forward, own, cuts, inputs)
    # By their size alone: the forward pass must not depend on what else is kept.
    towers = [
        tower
        for tower in shelf.kept.towers[key]
        if not tower.names & trained
        and tower.num_bytes * (1 if tower.constant else len(examples)) <= shelf.kept.most_bytes
    ]
    if not towers:
        return None
    names = {name for tower in towers for name in tower.names}
    below = digests_of({name: source[name] for name in names})
    own_below = {tower: joined(below, tower.names) for tower in towers}
    keys = {
        tower: shelf.key("constant", tower, own_below[tower], of_client=False)
        if tower.constant
        else shelf.key("hidden", what, tower, own_below[tower], size)
        for tower in towers
    }
    found = {tower: shelf.kept.get(keys[tower]) for tower in towers}
    missing = [tower for tower in towers if found[tower] is None]
    tables = {tower: entry["hidden"] for tower, entry in found.items() if entry is not None}
    for tower, table in _computed(module, forward, own, examples, size, missing).items():
        shelf.kept.put(keys[tower], {"hidden": table})
        tables[tower] = table
    return Frozen(forward, module, {tower: tables[tower] for tower in towers}, below)


def _computed(
    module: nn.Module,
    forward: Forward,
    params: Params,
    examples: Examples,
    size: int,
    towers: Sequence[Tower],
) -> dict[Tower, Tensor]:
    """Each tower's hidden states of all examples [n, ...], or its only one."""
    device = next(iter(params.values())).device
    tables: dict[Tower, Tensor] = {}
    once = [tower for tower in towers if tower.constant]
    if once:
        first = examples.batch(torch.arange(1))[0].to(device)
        tables |= hidden_of(module, forward, params, first, once)
    each = [tower for tower in towers if not tower.constant]
    parts = [
        hidden_of(module, forward, params, examples.batch(rows)[0].to(device), each)
        for rows in torch.split(torch.arange(len(examples)), size)
        if each
    ]
    return tables | {tower: torch.cat([part[tower] for part in parts]) for tower in each}


def _two(examples: Examples) -> Tensor:
    """Inputs of two examples; if there is but one, the second is the first one turned round."""
    first, last = examples.batch(torch.tensor([0, len(examples) - 1]))[0].unbind()
    return torch.stack([first, last if len(examples) > 1 else first.flip(-1)])
