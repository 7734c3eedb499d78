"""Width scaling: a cut layer sums fewer inputs, so its weights are multiplied by full / kept.

HeteroFL divides a cut layer's output by the ratio in training (Diao et al., ICLR 2021, "Scaler").
If all blocks of inputs look alike, the full output is exactly full / kept times the cut one, bias
excluded: so the weights are scaled, never the biases, inside the call and without model surgery.
In front of a normalisation it is inert.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.func import functional_call

from tesserafl.core.fit import Forward, WidthScaling
from tesserafl.core.model import Model, Output
from tesserafl.core.modules import fan_in_dims
from tesserafl.core.params import Params
from tesserafl.core.submodel import SubModel


def fan_in_scales(model: Model, submodel: SubModel, module: nn.Module) -> dict[str, float]:
    """full / kept inputs of every linear layer whose inputs are cut.

    Keys are the small module's parameter aliases: a weight that an embedding shares with the head
    is scaled under the head's name alone. Frozen weights are not cut, and a low-rank change of
    fewer ranks is a smaller change, not a worse sum.
    """
    sources = _sources(module)
    ups = {pair.up for pair in model.low_rank}
    scales: dict[str, float] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        for own, dim in fan_in_dims(part).items():
            alias = f"{path}.{own}" if path else own
            if alias not in sources or sources[alias] in ups:
                continue
            view = submodel.views[sources[alias]]
            full, kept = model.shapes[view.name][dim], view.shape[dim]
            if full != kept:
                scales[alias] = full / kept
    return scales


def own_scales(model: Model, submodel: SubModel, module: nn.Module) -> dict[str, float]:
    """`fan_in_scales` of the weights that have one use, by parameter name.

    A weight that is shared has no scale of its own: its uses need different ones.
    """
    sources = _sources(module)
    uses = list(sources.values())
    scales = fan_in_scales(model, submodel, module)
    return {alias: s for alias, s in scales.items() if uses.count(sources[alias]) == 1}


def forward_of(
    model: Model, submodel: SubModel, module: nn.Module, width_scaling: WidthScaling
) -> Forward:
    """The sub-model as a function of its parameters; `module` was built at its sizes.

    Inputs [batch, ...] -> `Output`. Nothing is added to a plain call where nothing is cut. With
    `parameters` the caller has scaled the weights of `own_scales`; shared ones are scaled here.
    """
    scales = {} if width_scaling == "none" else fan_in_scales(model, submodel, module)
    if width_scaling == "parameters":
        own = own_scales(model, submodel, module)
        scales = {alias: scale for alias, scale in scales.items() if alias not in own}
    sources = _sources(module)
    # Recurrent layers keep a second list of their weights, which torch knows how to change.
    recurrent = any(isinstance(part, nn.RNNBase) for part in module.modules())
    places = None if recurrent else _places(module)
    aliases = list(sources) if places is None else [alias for _, _, alias in places]

    def forward(params: Params, inputs: Tensor) -> Output:
        given = {alias: params[sources[alias]] for alias in aliases}
        given |= {alias: given[alias] * scale for alias, scale in scales.items() if alias in given}
        return _output(_call(module, places, given, inputs))

    return forward


_Places = list[tuple[dict[str, nn.Parameter | None], str, str]]


def _places(module: nn.Module) -> _Places:
    """Where every parameter lies: a part's own parameters, the key there, the alias.

    A tied weight lies in several places, since only one use of it may be scaled.
    """
    return [
        (part._parameters, key, f"{path}.{key}" if path else key)
        for path, part in module.named_modules()
        for key, value in part._parameters.items()
        if value is not None
    ]


def _call(
    module: nn.Module, places: _Places | None, given: Params, inputs: Tensor
) -> Output | Tensor:
    """`torch.func.functional_call`, without finding the places anew in every call."""
    out: Output | Tensor
    if places is None:
        out = functional_call(module, given, (inputs,), tie_weights=False)
        return out
    held = [own[key] for own, key, _ in places]
    try:
        for own, key, alias in places:
            own[key] = given[alias]  # type: ignore[assignment]
        out = module(inputs)
        return out
    finally:
        for (own, key, _), value in zip(places, held, strict=True):
            own[key] = value


def hollow(module: nn.Module) -> nn.Module:
    """The module without memory for weights of its own, for a `forward_of` that brings them.

    Its parameters keep their shapes; what they hold is one zero, for code that looks at them
    elsewhere than where they are registered.
    """
    for value in module.parameters():
        value.data = value.data.new_zeros(()).expand(value.shape)
    return module


def _sources(module: nn.Module) -> dict[str, str]:
    """Parameter alias -> the name under which the parameter counts."""
    names = {id(value): name for name, value in module.named_parameters()}
    return {
        alias: names[id(value)] for alias, value in module.named_parameters(remove_duplicate=False)
    }


def _output(out: Output | Tensor) -> Output:
    return Output(out, None) if isinstance(out, Tensor) else out
