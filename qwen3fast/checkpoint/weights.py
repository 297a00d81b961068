"""Safetensors files -> the parameters of a model built on `meta`.

Files are memory-mapped. On the CPU, in the dtype of the file, parameters *are* the mapped pages: loading copies
nothing. Otherwise one tensor at a time is converted or moved, so the peak is one model plus one tensor. Experts that
are tensors of their own are copied into stacks. Of a model over several processes, each reads its part.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import re
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from safetensors import SafetensorError, safe_open
from torch import nn

from qwen3fast._json import read_json
from qwen3fast.checkpoint.checks import dtype_problem, no_weights, non_finite
from qwen3fast.checkpoint.experts import ExpertStacks
from qwen3fast.checkpoint.prequantized import PrequantizedLayer, PrequantizedLayers
from qwen3fast.checkpoint.prequantized.format import PrequantizedFormat
from qwen3fast.model import Qwen3, build_on_meta
from qwen3fast.model.config import ModelConfig
from qwen3fast.parallel import Split
from qwen3fast.quantization import get_format
from qwen3fast.quantization.formats import fits
from qwen3fast.quantization.linear import PARAMETER_NAMES, QuantizedLinear

logger = logging.getLogger(__name__)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Tensors of published checkpoints that a Qwen3 has no use for: tables of RoPE, which are computed, masks of old
# versions of transformers, and the heads of trainers (rewards, values, classification).
WITHOUT_USE = re.compile(
    r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached|original_inv_freq)|(.*\.)?attn\.(masked_bias|bias)"
    r"|(.*\.)?(v_head|value_head|reward_head|score|classifier|summary)\.(.*\.)?(weight|bias)"
)
MADV_POPULATE_READ = 22  # of Linux; Python has no name for it yet
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


# Called with the model and the name of each parameter that has got its tensor; it may replace the parameter's module.
OnAssigned = Callable[[Qwen3, str], None]


def load_weights(
    model: Qwen3,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    progress: bool = False,
    quantization: str | None = None,
    on_assigned: OnAssigned | None = None,
    check_weights: bool = False,
    split: Split | None = None,
    prequantized: PrequantizedFormat | None = None,
) -> None:
    """Fill `model` (on meta) from the safetensors of `folder`.

    check_weights: look for NaN and infinity, in `dtype`. split: of which part of the weights it is a model.

    Module and tensor names are the same, but that checkpoints of Qwen3Model (such as Qwen3-Embedding) leave "model."
    out, that some hold each expert's tensors apart (see experts.py), and that layers which others quantized
    (`prequantized`) have several tensors in place of a weight. Such layers get plain weights,
    or those of a format, `quantization`.

    Raises: FileNotFoundError for a missing file; ValueError naming tensors and files for missing, unexpected or
    misshaped tensors, those of a wrong dtype, and for damaged files. On an error the model must be discarded.
    """
    files = tensors_by_file(folder)
    _read_ahead(list(files))
    all_names = {name for names in files.values() for name in names}
    filler = _Filler(
        model, device, dtype, quantization, on_assigned, check_weights, split, all_names, progress, prequantized
    )
    for file, names in files.items():
        with open_tensors(file) as tensors:
            available = dict.fromkeys(tensors.keys())
            for name in dict.fromkeys([*names, *available]):
                if name not in available:
                    filler.problems.append(f"{name}: the index names {file.name}, which does not hold it")
                elif name in names or name not in all_names:  # else it is another file's, by the index
                    filler.put(name, file.name, tensors)
                else:
                    filler.unused.append(name)
    filler.bar.close()
    if filler.unused:
        logger.warning("%s: not used: %s", folder, ", ".join(filler.unused[:20]))
    refuse([*filler.problems, *filler.missing()], f"the weights in {folder} do not fit its config.json")
    refuse(filler.bad_numbers, f"the weights in {folder} are not all finite in {str(dtype).removeprefix('torch.')}")
    model.tie_weights()


class _Filler:
    """Puts tensors of files in the places of a model's parameters, and notes what does not fit."""

    def __init__(
        self,
        model: Qwen3,
        device: torch.device,
        dtype: torch.dtype,
        quantization: str | None,
        on_assigned: OnAssigned | None,
        check_weights: bool,
        split: Split | None,
        names: set[str],
        progress: bool,
        prequantized: PrequantizedFormat | None,
    ) -> None:
        self._on_assigned, self._check_weights, self._split = on_assigned, check_weights, split
        self._model, self._device, self._dtype = model, device, dtype
        self._format = None if quantization is None else get_format(quantization)
        self._expected = _shapes(model)
        self._has_embedding = bool({EMBEDDING, EMBEDDING.removeprefix("model.")} & names)
        self._stacks = ExpertStacks(self._expected, device, dtype)
        whole = self._expected if split is None else _shapes(build_on_meta(split.config))  # as files have them
        pieces = {name: piece.shape for name, piece in ExpertStacks(whole, device, dtype).pieces.items()}
        self._shapes = whole | pieces
        linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        weights = {name: shape for name, shape in self._expected.items() if name in linears} | pieces
        self._layers = PrequantizedLayers(prequantized, weights, {self._place(name) for name in names}, device)
        self._packed = {name: p.dtype for name, p in model.named_parameters() if name.endswith(PARAMETER_NAMES)}
        self._loaded: set[str] = set()
        self.unused: list[str] = []
        self.problems: list[str] = []
        self.bad_numbers: list[str] = []
        self.bar = tqdm(total=len(self._expected), desc="loading weights", unit="tensor", disable=not progress)

    def _place(self, name: str) -> str:
        """Return the name that a tensor has in a Qwen3ForCausalLM."""
        if name == "lm_head.weight" and not self._has_embedding and name not in self._expected:
            return EMBEDDING  # tied, and stored under the other name
        return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"

    def put(self, name: str, file: str, tensors: Any) -> None:
        """Put one tensor of an open file in its place, or note why it has none."""
        if WITHOUT_USE.fullmatch(name) and self._place(name) not in self._shapes:
            self.unused.append(name)
            return
        if name == "lm_head.weight" and name not in self._expected and self._has_embedding:
            return  # tied, and the same numbers: see `stored_head`
        if name.startswith("lm_head.") and self._model.lm_head is None:
            return  # not wanted
        place, stored = self._place(name), tensors.get_slice(name)
        shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
        part = self._layers.part(place, dtype)
        expected = self._shapes.get(place) if part is None else part.shape
        if expected is None:
            self.problems.append(f"{name} in {file}: unexpected, this Qwen3 has no such tensor")
        elif shape != expected:
            self.problems.append(f"{name} in {file}: shape {shape}, expected {expected}")
        elif part is None and (wrong := dtype_problem(dtype, self._packed.get(place))) is not None:
            self.problems.append(f"{name} in {file}: {wrong}")
        elif part is not None and dtype not in part.dtypes:
            self.problems.append(f"{name} in {file}: dtype {dtype}, expected {' or '.join(part.dtypes)}")
        elif self._is_loaded(place) or (part is not None and not self._layers.awaits(place)):
            self.problems.append(f"{name} in {file}: {place} was there already")
        elif part is None:
            tensor = tensors.get_tensor(name) if self._split is None else self._split.take(name, stored)
            self._put_plain(place, _aligned(tensor), f"{name} in {file}")
        elif (layer := self._layers.put(place, _aligned(tensors.get_tensor(name)))) is not None:
            self._put_layer(*layer)

    def _is_loaded(self, place: str) -> bool:
        pieces = self._stacks.pieces
        return place in self._loaded or (place in pieces and pieces[place].target in self._loaded)

    def _put_plain(self, place: str, tensor: torch.Tensor, where: str) -> None:
        tensor = tensor.to(self._device) if place in self._packed else tensor.to(self._device, self._dtype)
        if self._check_weights and (counts := non_finite(tensor)) is not None:
            self.bad_numbers.append(f"{where}: {counts}")
        self._loaded.add(place)
        whole = self._stacks.put(place, tensor) if place in self._stacks.pieces else (place, tensor)
        if whole is not None:
            assign(self._model, *whole, self._on_assigned)
            self._loaded.add(whole[0])
            self.bar.update()

    def _put_layer(self, weight: str, layer: PrequantizedLayer) -> None:
        try:
            if self._format is None or weight in self._stacks.pieces or not fits(*layer.shape):
                self._put_plain(weight, layer.plain(self._dtype), weight)
            else:
                name = weight.removesuffix(".weight")
                linear = self._model.get_submodule(name)
                assert isinstance(linear, nn.Linear), "only linear layers are published so"
                self._model.set_submodule(name, QuantizedLinear(layer.packed(self._format), self._format, linear.bias))
                self._loaded.add(weight)
                self.bar.update()
        except ValueError as err:
            self._loaded.add(weight)
            self.problems.append(f"{weight}: {err}")

    def missing(self) -> list[str]:
        """What has not come, unless something else was said of it already."""
        reported = {self._place(problem.split(":")[0].split(" in ")[0]) for problem in self.problems}
        pieces, parts = self._stacks.unfinished(), self._layers.unfinished()
        begun = {*pieces, *parts, *(self._layers.weight_of(name) for name in reported)}
        begun |= {self._stacks.pieces[weight].target for weight in begun if weight in self._stacks.pieces}
        names = [name for name in self._expected if name not in self._loaded and name not in begun]
        names += [name for names in pieces.values() for name in names if name not in parts]
        texts = {name: f"shape {self._shapes[name]}" for name in names}
        texts |= {name: self._layers.describe(name) for names in parts.values() for name in names}
        return [f"{name}: missing, expected {text}" for name, text in texts.items() if name not in reported]


def _shapes(model: Qwen3) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def tensors_by_file(folder: Path) -> dict[Path, list[str]]:
    """Which tensors to read from which file.

    Raises: FileNotFoundError for missing files; ValueError for an index that is damaged or leaves the folder.
    """
    is_whole = (folder / SINGLE_FILE).is_file()
    if (folder / INDEX_FILE).is_file():
        weight_map = read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{folder / INDEX_FILE} has no 'weight_map'")
        by_file: dict[Path, list[str]] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file or len(file) > 200:
                raise ValueError(f"{folder / INDEX_FILE}: {file!r:.300} must be a file name without folders")
            if not file.endswith(".safetensors"):
                raise ValueError(f"{folder / INDEX_FILE}: {file!r} is not a safetensors file; no others are read")
            by_file.setdefault(folder / file, []).append(name)
        if is_whole and folder / SINGLE_FILE not in by_file:
            # What merging or quantizing in place leaves behind: transformers reads the whole file, too.
            logger.warning("%s: %s is read; %s is of other files and is not", folder, SINGLE_FILE, INDEX_FILE)
            return {folder / SINGLE_FILE: _names_in(folder / SINGLE_FILE)}
        absent = [file.name for file in by_file if not file.is_file()]
        if absent:
            raise FileNotFoundError(f"{folder} lacks {', '.join(absent)}, named in {INDEX_FILE}; download it again")
        return by_file
    if is_whole:
        return {folder / SINGLE_FILE: _names_in(folder / SINGLE_FILE)}
    raise no_weights(folder, f"{SINGLE_FILE} or {INDEX_FILE}")


def _names_in(file: Path) -> list[str]:
    with open_tensors(file) as tensors:
        return list(tensors.keys())


def stored_head(folder: Path) -> bool:
    """Return whether a checkpoint that says it is tied holds an output projection of other numbers all the same.

    Such are read by transformers 5 as untied. Raises: as `tensors_by_file`, and ValueError for a damaged file.
    """
    places = {name: file for file, names in tensors_by_file(folder).items() for name in names}
    embedding = next((name for name in (EMBEDDING, EMBEDDING.removeprefix("model.")) if name in places), None)
    if embedding is None or HEAD not in places:
        return False
    stored = []
    for name in (embedding, HEAD):
        with open_tensors(places[name]) as tensors:
            stored.append(tensors.get_tensor(name))
    return stored[0].shape != stored[1].shape or not torch.equal(stored[0], stored[1].to(stored[0].dtype))


def refuse_size(config: ModelConfig, folder: Path) -> None:
    """Refuse a config.json of a model far larger than its files: the modules alone could fill the memory.

    Raises: ValueError if there is less than a bit for each parameter, or a file is damaged.
    """
    files = tensors_by_file(folder)
    num_bytes = sum(file.stat().st_size for file in files)
    if config.num_parameters > 8 * num_bytes:
        for file in files:
            with open_tensors(file):
                pass  # not truncated, or that is what is said
        raise ValueError(
            f"{folder}: config.json describes {config.num_parameters:,} parameters, but the weights are {num_bytes:,} "
            "bytes; one of them is damaged or of another model: download both again"
        )


def refuse(problems: list[str], summary: str) -> None:
    """Raises: ValueError with the summary and the first problems, if there are any."""
    if problems:
        more = f"\n  ... and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{summary}:\n  " + "\n  ".join(problems[:8]) + more)


def open_tensors(file: Path):
    """A safetensors file, memory-mapped.

    Raises: ValueError if it is damaged.
    """
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as err:
        raise ValueError(f"{file} is damaged or truncated ({err}); download it again") from err


def _read_ahead(files: list[Path]) -> None:
    """Have files read in order by a thread, while compilers are imported and compile.

    Mapped pages are else read when each is first touched, in small pieces. What would fill most of the memory is left
    alone, as its pages would push each other out.
    """
    if sys.platform != "linux":
        return
    if sum(file.stat().st_size for file in files) <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2:
        threading.Thread(target=_populate, args=(files,), name="qwen3fast-read-ahead", daemon=True).start()


def _populate(files: list[Path]) -> None:
    """Map each file for a moment and have the system touch all of its pages, in one call that holds no lock of Python.

    (POSIX_FADV_WILLNEED would read no more than the device's readahead at a time, and a loop over it would wait for
    Python's lock each time.)
    """
    with suppress(OSError, ValueError, AttributeError):  # it is only advice; systems before Linux 5.14 do not take it
        madvise = ctypes.CDLL(None).madvise
        for file in files:
            with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
                pages = np.frombuffer(mapped, np.uint8)
                madvise(ctypes.c_void_p(pages.ctypes.data), ctypes.c_size_t(pages.size), MADV_POPULATE_READ)
                del pages


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied if its bytes do not begin at a multiple of its elements' size (some writers do so)."""
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def assign(model: Qwen3, name: str, tensor: torch.Tensor, on_assigned: OnAssigned | None = None) -> None:
    """Put a tensor in the place of a parameter, on meta or not."""
    module_name, _, parameter_name = name.rpartition(".")
    module = model.get_submodule(module_name)
    module.register_parameter(parameter_name, nn.Parameter(tensor, requires_grad=False))
    if on_assigned is not None:
        on_assigned(model, name)
