"""Assign tensors to a model's parameters."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from qwen3fast.model import Qwen3

# Called with the model and the name of each parameter that was assigned; it may replace the parameter's module.
OnAssigned = Callable[[Qwen3, str], None]


def assign(model: Qwen3, name: str, tensor: Tensor, on_assigned: OnAssigned | None = None) -> None:
    """Make `tensor` the parameter of this name; the old parameter may be on meta."""
    module_name, _, parameter_name = name.rpartition(".")
    module = model.get_submodule(module_name)
    module.register_parameter(parameter_name, nn.Parameter(tensor, requires_grad=False))
    if on_assigned is not None:
        on_assigned(model, name)


def shapes_of(model: Qwen3) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all parameters by name; tied ones appear once."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
