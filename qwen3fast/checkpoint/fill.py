"""Safetensors files -> the parameters of a model built on `meta`.

Files are memory-mapped. On the CPU, in the dtype of the file, parameters *are* the mapped pages: loading copies
nothing (kernels/cpu/huge_pages.py does, later). Otherwise tensors are converted or moved one at a time, and the peak
is one model plus one tensor. Each rank of a model over several processes reads its shard.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils.tqdm import tqdm
from torch import Tensor, nn

from qwen3fast.checkpoint.assign import OnAssigned, assign, shapes_of
from qwen3fast.checkpoint.checks import dtype_problem, non_finite, refuse
from qwen3fast.checkpoint.experts import PROJECTIONS, ExpertStacks
from qwen3fast.checkpoint.prequantized.collect import PrequantizedLayers
from qwen3fast.checkpoint.prequantized.format import PrequantizedFormat
from qwen3fast.checkpoint.prequantized.layer import PrequantizedLayer
from qwen3fast.checkpoint.read_ahead import read_ahead
from qwen3fast.checkpoint.safetensors import EMBEDDING, HEAD, open_tensors, place_of, tensors_by_file
from qwen3fast.model import Qwen3, build_on_meta
from qwen3fast.model.moe import Experts
from qwen3fast.parallel import Split
from qwen3fast.quantization.convert import get_format
from qwen3fast.quantization.experts import QuantizedExperts
from qwen3fast.quantization.folding import fold_orders
from qwen3fast.quantization.formats import Format, Packed, quantize
from qwen3fast.quantization.layers import PARAMETER_NAMES, QuantizedEmbedding, QuantizedLinear
from qwen3fast.quantization.ordered import OrderedLinear, find_shared_orders, order_problems

logger = logging.getLogger(__name__)

# Tensors that a Qwen3 has no use for: tables of RoPE, which are computed, masks of old versions of transformers, the
# heads of trainers (rewards, values, classification), drafts of further tokens (multi-token prediction, EAGLE, Medusa),
# and what reads images.
WITHOUT_USE = re.compile(
    r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached|original_inv_freq)|(.*\.)?attn\.(masked_bias|bias)"
    r"|(.*\.)?(input|output|q|k|v)_(scale|zero_point)"  # of activations and caches that another engine quantizes
    r"|(.*\.)?(v_head|value_head|reward_head|score|classifier|summary)\.(.*\.)?(weight|bias)"
    r"|(model\.)?(mtp|mtp_layers|eagle|eagle_head|eagle_module|draft_model|medusa_head|midlayer|visual)\..*|d2t|t2d"
)
ROUTER = ".mlp.gate.weight"  # stays plain: it is small, and its choice of experts matters


@dataclass(frozen=True)
class FillOptions:
    """Options of `load_weights`.

    prequantized: how other software stored the linear layers; quantization: the format that these get, None for plain
    weights. on_assigned: called after each parameter. check_weights: refuse NaN and infinity, in `dtype`.
    split: the shard that the model is.
    """

    device: torch.device
    dtype: torch.dtype
    quantization: str | None = None
    on_assigned: OnAssigned | None = None
    check_weights: bool = False
    split: Split | None = None
    prequantized: PrequantizedFormat | None = None


def load_weights(model: Qwen3, folder: Path, options: FillOptions, progress: bool = False) -> None:
    """Fill `model` (on meta) from the safetensors of `folder`.

    Tensors have the names of the model's parameters, with three exceptions: checkpoints of Qwen3Model (such as
    Qwen3-Embedding) omit "model."; some store experts one by one (see experts.py); and prequantized layers have several
    tensors instead of a weight. Tensors in WITHOUT_USE are skipped and named in the log.

    Raises: FileNotFoundError for a missing file; ValueError naming tensors and files for missing, unexpected or
    misshaped tensors, for wrong dtypes, and for damaged files. On an error the model must be discarded.
    """
    files = tensors_by_file(folder)
    read_ahead(list(files))
    all_names = {name for names in files.values() for name in names}
    bar = tqdm(total=len(shapes_of(model)), desc="loading weights", unit="tensor", disable=not progress)
    filler = _Filler(model, options, all_names, bar)
    for file, names in files.items():
        with open_tensors(file) as tensors:
            available = dict.fromkeys(tensors.keys())
            for name in dict.fromkeys([*names, *available]):
                if name not in available:
                    filler.problems.append(f"{name}: the index names {file.name}, which does not hold it")
                elif name in names or name not in all_names:  # otherwise it is another file's, by the index
                    filler.put(name, file.name, tensors)
                else:
                    filler.unused.append(name)
    bar.close()
    if filler.unused:
        more = f" and {len(filler.unused) - 20} more" if len(filler.unused) > 20 else ""
        logger.warning("%s: tensors not used: %s%s", folder, ", ".join(filler.unused[:20]), more)
    problems = [*filler.problems, *filler.missing()] or order_problems(model)
    refuse(problems, f"the weights in {folder} do not fit its config.json")
    refuse(
        filler.bad_numbers, f"the weights in {folder} are not all finite in {str(options.dtype).removeprefix('torch.')}"
    )
    model.tie_weights()
    fold_orders(model)
    find_shared_orders(model)


class _Filler:
    """The assignment of files' tensors to a model's parameters, with the names of tensors that do not fit."""

    def __init__(self, model: Qwen3, options: FillOptions, names: set[str], bar: Any) -> None:
        """names: of all tensors that will come. bar: advances with each parameter."""
        self._model, self._options, self._bar = model, options, bar
        device, split = options.device, options.split
        name, stored = options.quantization, options.prequantized
        self._format = stored.as_format(get_format(name)) if name and stored else None
        self._expected = shapes_of(model)
        self._has_embedding = any(place_of(name) == EMBEDDING for name in names)
        self._stacks = ExpertStacks(self._expected, device, options.dtype)
        whole = self._expected if split is None else shapes_of(build_on_meta(split.config))  # as files have them
        slices = {name: part.shape for name, part in ExpertStacks(whole, device, options.dtype).slices.items()}
        self._shapes = whole | slices
        linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        self._targets = {name: part.target for name, part in self._stacks.slices.items()}
        self._targets |= {target: target for target in self._targets.values()}  # files hold slices, or stacks
        weights = {n: s for n, s in self._expected.items() if n in linears or n in self._targets} | slices
        self._layers = PrequantizedLayers(options.prequantized, weights, {self._place(n) for n in names}, device)
        self._packed_stacks = self._stacks_to_pack()
        self._packed = {name: p.dtype for name, p in model.named_parameters() if name.endswith(PARAMETER_NAMES)}
        layers = ((n, m) for n, m in model.named_modules() if isinstance(m, QuantizedLinear | QuantizedEmbedding))
        self._fp8 = {f"{name}.weight_packed" for name, layer in layers if layer.format.name == "fp8"}
        self._loaded: set[str] = set()
        self.unused: list[str] = []
        self.problems: list[str] = []
        self.bad_numbers: list[str] = []

    def put(self, name: str, file: str, tensors: Any) -> None:
        """Assign one tensor of an open file, or record why it cannot be assigned."""
        place = self._place(name)
        if WITHOUT_USE.fullmatch(name) and place not in self._shapes:
            self.unused.append(name)
            return
        if name == HEAD and place == HEAD and HEAD not in self._expected and self._model.lm_head is not None:
            return  # tied, and the same numbers: see `has_other_head`
        if name.startswith("lm_head.") and self._model.lm_head is None and place != EMBEDDING:
            return  # left out on request
        stored = tensors.get_slice(name)
        if (problem := self._problem(place, tuple(stored.get_shape()), stored.get_dtype())) is not None:
            self.problems.append(f"{name} in {file}: {problem}")
        elif self._layers.expected(place, stored.get_dtype()) is None:
            split = self._options.split
            tensor = tensors.get_tensor(name) if split is None else split.take(place, stored)
            self._put_plain(place, _aligned(tensor), f"{name} in {file}")
        elif (layer := self._layers.put(place, _aligned(tensors.get_tensor(name)))) is not None:
            self._put_layer(*layer)

    def missing(self) -> list[str]:
        """Return a line per missing tensor, unless another line names it already."""
        reported = {self._place(problem.split(":")[0].split(" in ")[0]) for problem in self.problems}
        slices, parts = self._stacks.unfinished(), self._layers.unfinished()
        begun = {*slices, *parts, *(self._layers.weight_of(name) for name in reported)}
        begun |= {self._stacks.slices[weight].target for weight in begun if weight in self._stacks.slices}
        names = [name for name in self._expected if name not in self._loaded and name not in begun]
        names += [name for names in slices.values() for name in names if name not in parts]
        texts = {name: f"shape {self._shapes[name]}" for name in names}
        texts |= {name: self._layers.describe(name) for names in parts.values() for name in names}
        return [f"{name}: missing, expected {text}" for name, text in texts.items() if name not in reported]

    def _place(self, name: str) -> str:
        """Return the name that a tensor has in a Qwen3ForCausalLM."""
        if name == HEAD and HEAD not in self._expected and not self._has_embedding:
            return EMBEDDING  # tied, and stored under the other name
        return place_of(name)

    def _problem(self, place: str, shape: tuple[int, ...], dtype: str) -> str | None:
        """Return why a tensor cannot be assigned to a parameter; None if it can."""
        part = self._layers.expected(place, dtype)
        expected = self._shapes.get(place) if part is None else part.shape
        if expected is None:
            return "unexpected, this Qwen3 has no such tensor"
        if shape != expected:
            return f"shape {shape}, expected {expected}"
        if part is None and (problem := dtype_problem(dtype, self._packed.get(place))) is not None:
            return problem
        if part is not None and dtype not in part.dtypes:
            return f"dtype {dtype}, expected {' or '.join(part.dtypes)}"
        slices = self._stacks.slices
        is_loaded = place in self._loaded or (place in slices and slices[place].target in self._loaded)
        if is_loaded or (part is not None and not self._layers.awaits(place)):
            return f"{place} was loaded already"
        return None

    def _put_plain(self, place: str, tensor: Tensor, where: str) -> None:
        device, dtype = self._options.device, self._options.dtype
        tensor = tensor.to(device) if place in self._packed else tensor.to(device, dtype)
        numbers = tensor.view(torch.float8_e4m3fn) if place in self._fp8 else tensor
        if self._options.check_weights and (counts := non_finite(numbers)) is not None:
            self.bad_numbers.append(f"{where}: {counts}")
        self._loaded.add(place)
        slices = self._stacks.slices
        if self._format is not None and place in slices and slices[place].target in self._packed_stacks:
            self._put_expert(place, quantize(tensor, self._format))
            return
        if self._format is not None and place in self._packed_stacks:
            self._put_stack(place, QuantizedLinear(quantize(tensor.flatten(0, 1), self._format), self._format))
            return
        whole = self._stacks.put(place, tensor) if place in slices else (place, tensor)
        if whole is not None:
            assign(self._model, *whole, self._options.on_assigned)
            self._loaded.add(whole[0])
            self._bar.update()

    def _put_layer(self, weight: str, layer: PrequantizedLayer) -> None:
        try:
            is_packed = self._targets.get(weight) in self._packed_stacks
            is_plain = weight in self._targets or weight.endswith(ROUTER) or not self._fits(*layer.shape)
            if self._format is None or (is_plain and not is_packed):
                self._put_plain(weight, layer.plain(self._options.dtype).view(self._shapes[weight]), weight)
                return
            self._check_stored(weight, layer)
            if weight in self._packed_stacks:
                self._put_stack(weight, QuantizedLinear(layer.packed(self._format), self._format))
                return
            if is_packed:
                order_K = layer.input_order(self._format)
                self._put_expert(weight, layer.packed(self._format, order_K), order_K)
                self._loaded.add(weight)
                return
            name = weight.removesuffix(".weight")
            linear = self._model.get_submodule(name)
            assert isinstance(linear, nn.Linear), "only linear layers are prequantized"
            self._model.set_submodule(name, _quantized(layer, self._format, linear.bias))
            self._bar.update()
        except ValueError as err:
            self.problems.append(f"{weight}: {err}")
        self._loaded.add(weight)

    def _fits(self, out_features: int, in_features: int) -> bool:
        """Return whether a weight of this shape can be packed."""
        return self._format is not None and self._format.fits(out_features, in_features)

    def _check_stored(self, weight: str, layer: PrequantizedLayer) -> None:
        """Record numbers and scales of a layer that is packed, and so not checked in the model's dtype."""
        for end, tensor in layer.tensors.items() if self._options.check_weights else ():
            if (counts := non_finite(tensor)) is not None:
                self.bad_numbers.append(f"{weight.removesuffix('.weight')}, {end}: {counts}")

    def _stacks_to_pack(self) -> set[str]:
        """Return the stacks of experts that are packed: a layer's both, or none."""
        if self._format is None:
            return set()
        modules = {self._targets[weight].rpartition(".")[0] for weight in self._layers.stored & self._targets.keys()}
        unfit = {s.target.rpartition(".")[0] for s in self._stacks.slices.values() if not self._fits(*s.shape)}
        return {f"{module}.{stack}" for module in modules - unfit for stack in PROJECTIONS}

    def _put_expert(self, weight: str, packed: Packed, order_K: Tensor | None = None) -> None:
        """Put one expert's packed matrix in its stack, and the stack in the model with its last expert."""
        assert self._format is not None, "experts are packed in a format"
        whole = self._stacks.put_packed(weight, packed, self._format, order_K)
        if whole is not None:
            self._put_stack(*whole)

    def _put_stack(self, target: str, stack: QuantizedLinear) -> None:
        """Put the packed matrices of all experts of a layer in the model."""
        assert self._format is not None, "experts are packed in a format"
        name = target.rpartition(".")[0]
        experts = self._model.get_submodule(name)
        if isinstance(experts, Experts):  # on meta; the other stack's comes or came
            self._model.set_submodule(name, QuantizedExperts.of(experts, self._format))
        self._model.set_submodule(target, stack)
        self._loaded.add(target)
        self._bar.update()


def _quantized(layer: PrequantizedLayer, format: Format, bias: nn.Parameter | None) -> QuantizedLinear:
    order_K = layer.input_order(format)
    packed = layer.packed(format, order_K)
    return QuantizedLinear(packed, format, bias) if order_K is None else OrderedLinear(packed, format, order_K, bias)


def _aligned(tensor: Tensor) -> Tensor:
    """Return the tensor, copied if its bytes are not aligned to its elements (some writers' are not)."""
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor
