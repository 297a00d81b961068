"""Recording: the operations of a part of a step as a graph, with sizes that may vary as symbols.

PyTorch's side of it is imported when something is recorded: that is slow.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from qwen3fast.kernels.compiling import compiling


@dataclass(frozen=True)
class Recording:
    """A function of a module and of tensors as a graph.

    inputs: what the graph takes, as tensors without memory. weights, tensors: which of the module's parameters and,
    after these, which of the function's tensors they are; what the function does not read is left out.
    shapes: PyTorch's ShapeEnv, which knows the symbols.
    """

    graph: GraphModule
    inputs: list[Tensor]
    weights: list[int]
    tensors: list[int]
    shapes: Any

    def serves(self, sizes: dict[int, int]) -> bool:
        """Whether the graph is right for these sizes, given for each size that it was recorded with.

        What recording or compiling assumed of a symbol's value was noted down by PyTorch.
        """
        values = {symbol: sizes[int(size)] for symbol, size in self.shapes.backed_var_to_val.items()}
        # 0 and 1 are never assumed to be like other sizes.
        return all(size > 1 for size in values.values()) and all(
            bool(guard.expr.xreplace(values)) for guard in self.shapes.guards
        )


def record(
    function: Callable[..., Tensor],
    module: nn.Module | None,
    tensors: Sequence[Tensor | None],
    dynamic: Sequence[dict[int, int]],
) -> Recording:
    """Record `function(module, *tensors)`; see `compile.Dynamic`. Tensors may be without memory already, then all."""
    from torch._subclasses import FakeTensor, FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    shapes = ShapeEnv()
    parameters = [] if module is None else list(module.parameters())
    modes = [t.fake_mode for t in (*parameters, *tensors) if isinstance(t, FakeTensor)]
    mode = modes[0] if modes else FakeTensorMode(shape_env=shapes)
    weights = [_without_memory(mode, "", parameter, {}) for parameter in parameters]
    # A module of its own: another thread may be using the given one.
    twin = copy.deepcopy(module, {id(p): weight for p, weight in zip(parameters, weights, strict=True)})
    fakes = [
        None if tensor is None else _without_memory(mode, f"input{i}", tensor, dims)
        for i, (tensor, dims) in enumerate(zip(tensors, dynamic, strict=True))
    ]
    present = [i for i, fake in enumerate(fakes) if fake is not None]

    # What it is given are the very tensors in `twin` and `fakes`.
    def call(*given: Tensor) -> tuple[Tensor]:
        return (function(twin, *fakes),)

    given = [*weights, *(fake for fake in fakes if fake is not None)]
    with mode, compiling():
        graph = make_fx(call)(*given)
    used = []
    for i, node in enumerate(graph.graph.find_nodes(op="placeholder")):
        if node.users:
            used.append(i)
        else:
            graph.graph.erase_node(node)
    graph.recompile()
    return Recording(
        graph,
        inputs=[given[i] for i in used],
        weights=[i for i in used if i < len(weights)],
        tensors=[present[i - len(weights)] for i in used if i >= len(weights)],
        shapes=shapes,
    )


def _without_memory(mode: Any, name: str, tensor: Tensor, dynamic: dict[int, int]) -> Tensor:
    """A tensor like the given one in a FakeTensorMode, in which some dimensions are symbols."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    if not dynamic:
        return tensor if getattr(tensor, "fake_mode", None) is mode else mode.from_tensor(tensor, static_shapes=True)
    example = tensor.new_empty([dynamic.get(i, size) for i, size in enumerate(tensor.shape)])
    # DUCK: equal sizes get the same symbol.
    kinds = [DimDynamic.DUCK if i in dynamic else DimDynamic.STATIC for i in range(tensor.dim())]
    context: Any = StatelessSymbolicContext(dynamic_sizes=kinds)
    return mode.from_tensor(example, source=ConstantSource(name), symbolic_context=context)
