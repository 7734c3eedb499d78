"""Programs of plain tensor operations: traced once, then neither autograd nor vmap nor modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

Program = Callable[..., list[Tensor]]
"""Flat tensors in, flat tensors out."""

_ATEN = torch.ops.aten


def trace(function: Program, examples: Sequence[Tensor], *, compiled: bool) -> Program:
    """`function` as straight-line tensor operations, for tensors of the examples' shapes.

    Args:
        function: takes and returns flat tensors; may use `torch.func`.
        examples: inputs of the shapes that the program will see.
        compiled: hand the program to torch.compile. Takes seconds and a C++ compiler.
    """
    traced = make_fx(functionalize(function), tracing_mode="fake", _allow_non_fake_inputs=True)(
        *examples
    )
    graph = traced.graph
    _simplify(graph)
    graph.set_codegen(fx.graph.CodeGen())  # flat arguments: no tree to take apart in every call
    program = fx.GraphModule(traced, graph)  # which holds the buffers and constants
    if not compiled:
        return program.forward
    from torch._inductor import compile as lower  # imports the compiler: seconds

    lowered = lower(program, list(examples))
    return lambda *tensors: list(lowered(*tensors))


def _simplify(graph: fx.Graph) -> None:
    """Drop operations that do nothing, and those that repeat an earlier one.

    What vmap leaves behind: a third of the operations of a small network's step.
    """
    seen: dict[object, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or _draws(node):
            continue
        source = _unchanged(node)
        if source is None:
            # As text: numbers that are equal but of another type (1, 1.0, True) differ there.
            key = (node.target, repr(node.args), repr(sorted(node.kwargs.items())))
            source = seen.setdefault(key, node)
        if source is not node:
            node.replace_all_uses_with(source)
            graph.erase_node(node)
    graph.eliminate_dead_code()
    graph.lint()


def _draws(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _unchanged(node: fx.Node) -> fx.Node | None:
    """The input that the node passes on as it is."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if node.target is _ATEN.detach.default:
        return source
    same = _kind(node) is not None and _kind(node) == _kind(source)
    if node.target is _ATEN.mul.Scalar and node.args[1] == 1:
        return source if same else None
    if node.target in (_ATEN.expand.default, _ATEN.view.default, _ATEN._unsafe_view.default):
        return source if same else None
    return None


def _kind(node: fx.Node) -> tuple[object, ...] | None:
    value = node.meta.get("val", node.meta.get("tensor_meta"))
    if value is None or not hasattr(value, "shape"):  # several outputs have none
        return None
    return tuple(value.shape), value.dtype
