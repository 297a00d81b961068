"""GeneratorOptions: the settings of a Generator, checked before any weights are read; and options of commands."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from qwen3fast.checks import VARIABLES, checked_flag, checked_integer, checked_option, checked_variable
from qwen3fast.engine.compile import CompileMode
from qwen3fast.engine.threads import checked_threads
from qwen3fast.kernels.cpu.library import usable_levels
from qwen3fast.kernels.forms import FIRST, MEASURED
from qwen3fast.model.config import ModelConfig
from qwen3fast.model.kv_cache import CACHE_DTYPES
from qwen3fast.quantization.convert import DEQUANTIZE
from qwen3fast.quantization.formats import ALL_FORMATS

Function = TypeVar("Function", bound=Callable[..., Any])
MAX_SEQ_LEN = 2**31 - 1
MAX_BATCH_SIZE = 4096
MAX_QUEUE = 10**6
MAX_ADAPTERS = 1024
MAX_ADAPTER_RANK = 1024
# Options by their names in transformers and vLLM.
OTHER_NAMES = {
    "torch_dtype": "dtype",
    "device_map": "device",
    "max_model_len": "max_seq_len",
    "max_num_seqs": "max_batch_size",
    "tensor_parallel_size": "tensor_parallel",
    "enforce_eager": "compile=False",
    "enable_prefix_caching": "prefix_reuse",
    "n_ctx": "max_seq_len",
    "n_threads": "threads",
    "load_in_4bit": 'quantization="int4"',
    "load_in_8bit": 'quantization="int8"',
    "hf_overrides": "rope_scaling or generation_config",
    "override_generation_config": "generation_config",
    "gpu_memory_utilization": "max_batch_size and max_seq_len",
}


@dataclass(frozen=True)
class GeneratorOptions:
    """The options of `Generator` and `Generator.from_pretrained`, each a keyword argument of both.

    Attributes:
        max_seq_len: prompt and reply together, in tokens; the KV cache is allocated for it.
        max_batch_size: requests that run at the same time, each in a slot of the cache; more requests wait.
        kv_cache_dtype: "auto" keeps keys and values in the weights' dtype; "int8" quantizes them, with one scale per
            vector, and takes half of bfloat16's memory.
        compile: True compiles before the first token, and on CPUs builds the C++ operations and measures forms; "auto"
            does so while tokens are generated (on CPUs; on CUDA it means True); False compiles nothing.
        cuda_graphs: replay decode steps as CUDA graphs; False launches each kernel from the host.
        prefix_reuse: keep keys and values of earlier requests, and compute only the part of a prompt after the longest
            prefix that it shares with one of them. Switch it off before changing weights in place.
        max_queue: requests that may wait in `submit` and `astream`.
        threads: CPU threads, for the whole process; None takes one per core.
        forms: where several forms of a computation serve, "measured" uses the fastest on this machine, measured once
            and kept in the cache folder; "first" measures nothing and uses the C++, with tiles on processors with AMX,
            for runs that can be repeated on machines of the same kind. The environment variable QWEN3FAST_FORMS=first
            does so for all Generators.
        adapters: LoRA adapters to load, folders or hub ids by name; `SamplingParams(adapter=name)` chooses one.
        max_adapters: adapters that are loaded at the same time; None leaves room for `adapters` only.
        max_adapter_rank: the largest rank of an adapter; None takes the largest one of `adapters`, or 16. Room for
            max_adapters of this rank is allocated at once.
    """

    max_seq_len: int = 4096
    max_batch_size: int = 1
    kv_cache_dtype: str = "auto"
    compile: CompileMode = True
    cuda_graphs: bool = True
    prefix_reuse: bool = True
    max_queue: int = 1024
    threads: int | None = None
    forms: str = MEASURED
    adapters: Mapping[str, str | Path] | None = None
    max_adapters: int | None = None
    max_adapter_rank: int | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> GeneratorOptions:
        """Return the options of keyword arguments. Raises: TypeError for an unknown one; ValueError for a bad value."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                hint = f"use {OTHER_NAMES[name]}" if name in OTHER_NAMES else f"the options are {', '.join(known)}"
                raise TypeError(f"unexpected keyword argument {name!r}; {hint}")
        return cls(**options)

    def __post_init__(self) -> None:
        """Check each option and variable. Raises: ValueError naming it, the allowed values, and the value."""
        for name in VARIABLES:
            checked_variable(name)
        usable_levels()
        for name, most in (("max_seq_len", MAX_SEQ_LEN), ("max_batch_size", MAX_BATCH_SIZE), ("max_queue", MAX_QUEUE)):
            self._set(name, checked_integer(name, getattr(self, name), 1, most))
        for name in ("cuda_graphs", "prefix_reuse"):
            self._set(name, checked_flag(name, getattr(self, name)))
        checked_option("kv_cache_dtype", self.kv_cache_dtype, tuple(CACHE_DTYPES))
        checked_option("forms", self.forms, (MEASURED, FIRST))
        if not (isinstance(self.compile, str) and self.compile == "auto"):
            self._set("compile", checked_flag("compile", self.compile, also="'auto'"))
        self._set("threads", checked_threads(self.threads))
        self._check_adapters()

    def _check_adapters(self) -> None:
        adapters = {} if self.adapters is None else self.adapters
        is_right = isinstance(adapters, Mapping) and all(
            isinstance(name, str) and name and isinstance(source, str | os.PathLike)
            for name, source in adapters.items()
        )
        if not is_right:
            raise ValueError(f"adapters must map names to folders or hub ids, got {self.adapters!r:.200}")
        self._set("adapters", dict(adapters))
        if self.max_adapters is not None:
            note = f" (adapters has {len(adapters)})"
            self._set(
                "max_adapters", checked_integer("max_adapters", self.max_adapters, len(adapters), MAX_ADAPTERS, note)
            )
        if self.max_adapter_rank is not None:
            rank = checked_integer("max_adapter_rank", self.max_adapter_rank, 1, MAX_ADAPTER_RANK)
            self._set("max_adapter_rank", rank)

    def check_model(self, config: ModelConfig) -> None:
        """Check the options that depend on the model. Raises: ValueError for a max_seq_len beyond its positions."""
        if self.max_seq_len > config.longest_context:
            is_stretched = config.longest_context > config.max_position_embeddings
            stretched = " (stretched by YaRN)" if is_stretched else ""
            advice = (
                "" if is_stretched else "; rope_scaling (--rope-scaling) stretches it by YaRN, see the model's card"
            )
            raise ValueError(
                f"max_seq_len {self.max_seq_len} exceeds the model's max_position_embeddings "
                f"{config.longest_context}{stretched}; choose at most that{advice}"
            )

    def warn_of_single_slot(self, num_replies: int) -> None:
        """Warn where several replies have one slot, for the caller of `Generator.generate`."""
        if num_replies > 1 and self.max_batch_size == 1:
            advice = "from_pretrained(..., max_batch_size=8) runs 8 at a time, which is faster"
            warnings.warn(f"{num_replies} replies run one after another; {advice}", stacklevel=4)  # past `takes_params`

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def takes_options(function: Function) -> Function:
    """Make `help` and `inspect` show the fields of GeneratorOptions instead of a function's `**options`."""
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    added = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields(GeneratorOptions)
    ]
    function.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
    return function


def add_loading_arguments(add: Callable[..., Any]) -> None:
    """Add the options of commands that load a model. add: `add_argument` of a parser or of a group."""
    add("--device", default="auto", help="auto, cpu or cuda; auto takes a GPU if there is one [%(default)s]")
    add("--dtype", default="auto", help="auto (the checkpoint's), bfloat16, float16 or float32 [%(default)s]")
    add("--quantization", choices=[*ALL_FORMATS, DEQUANTIZE], help="quantize the weights while loading; int6, uint5, "
        "nl4: on CPUs; lossless: pack bfloat16 in 12 bits, on CPUs; dequantize: use a prequantized checkpoint "
        "unquantized")  # fmt: skip
    add("--kv-cache-dtype", choices=CACHE_DTYPES, default="auto", help="int8: half of bfloat16's memory [%(default)s]")
    add("--no-calibrate", action="store_true", help="int4 and uint4 without the correction of errors, which takes "
        "time at the first load of a model")  # fmt: skip
    add(
        "--rope-scaling",
        type=_json_object,
        metavar="JSON",
        help="scaling of RoPE for contexts longer than the model's, "
        """as in config.json: '{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}'""",
    )
    add("--chat-template", metavar="FILE", help="Jinja template in place of the checkpoint's")
    add(
        "--override-generation-config",
        type=_json_object,
        metavar="JSON",
        help="fields of generation_config.json in "
        """place of the checkpoint's: '{"temperature": 0.7, "top_p": 0.8}'""",
    )
    add("--threads", type=int, metavar="N", help="CPU threads [one per core]")
    add("--no-cuda-graphs", action="store_true", help="on GPUs, launch each kernel of a step from the host, which is "
        "slower")  # fmt: skip


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r:.200}: {err}") from err
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r:.200}")
    return value
