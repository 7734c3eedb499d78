"""What we know of torch modules: their parameters, and which dimension of a weight takes inputs."""

from __future__ import annotations

from torch import nn

from tesserafl.core.params import Params


def parameters_of(module: nn.Module) -> Params:
    """The module's parameters as plain tensors that share its memory, each tied weight once."""
    return {name: value.detach() for name, value in module.named_parameters()}


def fan_in_dims(module: nn.Module) -> dict[str, int]:
    """Own parameter -> the dimension that runs over inputs, for modules that multiply by a matrix.

    The one place that knows how such weights lie. Empty for any other module.
    """
    if isinstance(module, nn.MultiheadAttention):
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return {name: 1 for name in names if getattr(module, name) is not None}
    if isinstance(module, nn.RNNBase):
        return {name: 1 for name, _ in module.named_parameters() if name.startswith("weight_")}
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return {"weight": 1}
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return {"weight": 0}
    if type(module).__name__ == "Conv1D":  # transformers' transposed linear layer (GPT-2)
        return {"weight": 0}
    return {}
