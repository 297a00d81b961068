"""Tensors of a GGUF file -> the parameters of a model built on `meta`, one tensor at a time."""

from __future__ import annotations

import torch
from huggingface_hub.utils.tqdm import tqdm
from torch import Tensor

from qwen3fast.checkpoint.assign import assign
from qwen3fast.checkpoint.checks import non_finite, non_finite_parts, refuse
from qwen3fast.checkpoint.gguf.header import Header
from qwen3fast.checkpoint.gguf.layout import OUTPUT, Place, places_of, replace_layers
from qwen3fast.checkpoint.gguf.tensors import StoredTensor
from qwen3fast.model import Qwen3
from qwen3fast.quantization.formats import Format, Packed


def load_gguf_weights(
    model: Qwen3,
    header: Header,
    formats: dict[str, Format],
    device: torch.device,
    dtype: torch.dtype,
    progress: bool = False,
    check_weights: bool = False,
) -> None:
    """Fill a plain `model` (on meta), after replacing the layers of `formats` by quantized ones.

    On the CPU, floats in `dtype` are the mapped pages of the file.
    check_weights: refuse NaN and infinity: plain weights in `dtype`, packed ones as the file has them.
    Raises: ValueError naming all tensors that are missing, unexpected, misshaped or of a type that is not supported,
    before anything is loaded, or that are not finite. On an error the model must be discarded.
    """
    tensors = {name: t for name, t in header.tensors.items() if name != OUTPUT or model.lm_head is not None}
    places = places_of(model)
    refuse(_problems(tensors, places), f"the tensors in {header.file} do not fit its metadata")
    replace_layers(model, formats, dtype)
    stacks: dict[str, Tensor] = {}
    packed_stacks: dict[str, Packed] = {}
    bad_numbers: list[str] = []
    for name, tensor in tqdm(tensors.items(), desc="loading weights", unit="tensor", disable=not progress):
        parameter, shape, half = places[name]
        plain = None if name in formats else tensor.plain(device, dtype)
        if check_weights:
            counts = non_finite_parts(tensor.numbers()) if plain is None else non_finite(plain)
            bad_numbers += [f"{name} in {tensor.file}: {counts}"] if counts else []
        if name in formats and len(shape) == 3:
            _put_experts(model, places[name], tensor.packed(formats[name], device), packed_stacks)
        elif plain is None:
            packed = tensor.packed(formats[name], device)
            assign(model, f"{parameter}_packed", packed.weight)
            assign(model, f"{parameter}_scale", packed.scale)
        elif half is None:
            assign(model, parameter, plain)
        else:
            if parameter not in stacks:
                experts, rows, columns = shape
                stacks[parameter] = torch.empty(experts, 2 * rows, columns, dtype=dtype, device=device)
                assign(model, parameter, stacks[parameter])
            stacks[parameter].chunk(2, dim=1)[half].copy_(plain)
    refuse(bad_numbers, f"the weights in {header.file} are not all finite in {str(dtype).removeprefix('torch.')}")
    model.tie_weights()


def _put_experts(model: Qwen3, place: Place, packed: Packed, stacks: dict[str, Packed]) -> None:
    """Put packed experts into the model; gate and up share a parameter, in which each expert's rows stand together."""
    if place.half is not None:
        num_experts = place.shape[0]
        if place.parameter not in stacks:
            stacks[place.parameter] = Packed(*(t.new_empty(2 * t.shape[0], *t.shape[1:]) for t in packed))
        for whole, part in zip(stacks[place.parameter], packed, strict=True):
            whole.unflatten(0, (num_experts, 2, -1))[:, place.half] = part.unflatten(0, (num_experts, -1))
        packed = stacks[place.parameter]
    assign(model, f"{place.parameter}.weight_packed", packed.weight)
    assign(model, f"{place.parameter}.weight_scale", packed.scale)


def _problems(tensors: dict[str, StoredTensor], places: dict[str, Place]) -> list[str]:
    """Return the problems of the tensors, one line each."""
    problems = []
    for name, tensor in tensors.items():
        if name not in places:
            problems.append(f"{name} in {tensor.file}: unexpected, this Qwen3 has no such tensor")
        elif tensor.shape != places[name].shape:
            problems.append(f"{name} in {tensor.file}: shape {tensor.shape}, expected {places[name].shape}")
        elif (refusal := tensor.refusal()) is not None:
            problems.append(refusal)
    missing = [name for name in places if name not in tensors]
    return problems + [f"{name}: missing, expected shape {places[name].shape}" for name in missing]
