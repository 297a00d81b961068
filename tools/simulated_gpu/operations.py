"""PyTorch's operations on simulated devices: each is computed by the CPU's operation, when the stream gets to it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from simulated_gpu.runtime import Runtime

# Operations that launch no kernel: PyTorch's own run.
NATIVE = {
    "_local_scalar_dense", "_pin_memory", "_reshape_alias", "as_strided", "empty", "empty_strided", "is_pinned",
    "is_set_to", "record_stream", "resize_", "set_", "unfold", "view", "view_as_complex", "view_as_real",
    "_fused_sdp_choice", "_nested_view_from_buffer", "_has_same_storage_numel", "lift_fresh", "alias",
}  # fmt: skip
WAIT = {"nonzero", "masked_select", "_unique2", "unique_dim", "equal", "bincount", "repeat_interleave", "is_nonzero"}
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "_int_mm", "_scaled_mm"}  # by a library's kernels
ATTENTION = {f"_scaled_dot_product_{kind}_attention" for kind in ("flash", "efficient", "cudnn")}


def install(runtime: Runtime) -> torch.library.Library:
    """Replace PyTorch's CUDA kernels of all operations; they stay so as long as the result is kept.

    Products and attention, which take long, do nothing unless all kernels run.
    """
    library = torch.library.Library("aten", "IMPL")
    native_copy = torch.library.get_kernel("aten::copy_", "CUDA")
    for full_name in {"aten::copy_", *torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")}:
        namespace, _, name = full_name.partition("::")
        base, _, overload = name.partition(".")
        if namespace != "aten" or base in NATIVE:
            continue
        operation = getattr(getattr(torch.ops.aten, base, None), overload or "default", None)
        if operation is None:
            continue
        runs = runtime.runs_all or base not in PRODUCTS | ATTENTION
        function: Callable[..., Any] = _Operation(runtime, operation, runs)
        if base == "copy_":
            function = _copy(runtime, function, native_copy)
        library.impl(full_name, function, "CUDA", allow_override=True)
    return library


def _copy(runtime: Runtime, on_device: Callable[..., Any], native: Any) -> Callable[..., Any]:
    """Return `copy_`: between host and device PyTorch's own, unless it would wait and keep Python from going on."""

    def copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if target.is_cuda and source.is_cuda:
            here, there = torch.cuda.current_stream(target.device), torch.cuda.current_stream(source.device)
            if target.device != source.device:  # each stream waits for the other, as for PyTorch's own copies
                here.wait_stream(there)
            on_device(target, source)
            if target.device != source.device:
                there.wait_stream(here)
            return target
        device = target.device if target.is_cuda else source.device
        with torch.cuda.device(device):
            stream = torch._C._cuda_getCurrentRawStream(device.index)
            if (non_blocking and (target.is_cuda or target.is_pinned())) or runtime.is_capturing(stream):
                native.call_boxed(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), target, source, non_blocking)
            elif target.is_cuda:
                values = source.expand(target.shape).to(target.dtype).contiguous()
                staged = target if target.is_contiguous() else torch.empty_like(target).contiguous()
                runtime.copy(staged.data_ptr(), values.data_ptr(), values.nbytes, stream)
                if staged is not target:
                    on_device(target, staged)
            else:
                values = source.expand(target.shape).to(target.dtype).contiguous()
                staged = target if target.is_contiguous() else torch.empty(target.shape, dtype=target.dtype)
                runtime.copy(staged.data_ptr(), values.data_ptr(), values.nbytes, stream)
                if staged is not target:
                    target.copy_(staged)
        return target

    return copy


def _attention(is_flash: bool, given: dict[str, Any]) -> tuple[Tensor]:
    """Compute what the attention kernels of libraries do, of their arguments by name."""
    q, k, v = (given[name] for name in ("query", "key", "value"))
    mask = given.get("attn_bias")
    if given.get("is_causal"):  # FlashAttention aligns queries with the last keys, the others with the first
        T, S = q.shape[2], k.shape[2]
        mask = torch.ones(T, S, dtype=torch.bool).tril(S - T if is_flash else 0)
    is_grouped, scale = q.shape[1] != k.shape[1], given.get("scale")
    result = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=is_grouped)
    return (result,)


class _Operation:
    """An operation, put into the current stream."""

    def __init__(self, runtime: Runtime, operation: Any, runs: bool) -> None:
        self._runtime, self._operation, self._runs = runtime, operation, runs
        self._name = operation._schema.name.partition("::")[2]
        library = "cublas" if self._name in PRODUCTS else "flash" if self._name in ATTENTION else "at::native"
        self._kernel = f"{library}::{self._name}"
        self._writes = any(
            argument.alias_info and argument.alias_info.is_write for argument in operation._schema.arguments
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        device = self._device(args, kwargs)
        with torch.cuda.device(device):
            return self._enqueue(device, args, kwargs)

    def _enqueue(self, device: torch.device, args: Any, kwargs: Any) -> Any:
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        if self._waits(args):
            self._runtime.synchronize(stream)
            results = self._compute(*_on_host((args, kwargs)))
            if self._writes:
                return self._written(args, kwargs)
            return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, results)
        if self._writes:
            self._resize_outputs(args, kwargs)
            written_args, written_kwargs = _on_host((args, kwargs))
            self._runtime.launch(stream, self._kernel, lambda: self._compute(written_args, written_kwargs))
            return self._written(args, kwargs)
        results = self._empty_results(device, args, kwargs)
        targets = [_host_view(x) if isinstance(x, Tensor) else None for x in tree_flatten(results)[0]]
        host_args, host_kwargs = _on_host((args, kwargs))

        def run() -> None:
            # Of attention, only the first of many results.
            for target, source in zip(targets, tree_flatten(self._compute(host_args, host_kwargs))[0], strict=False):
                if target is not None and source is not None:
                    target.copy_(source)

        self._runtime.launch(stream, self._kernel, run)
        return results

    def _empty_results(self, device: torch.device, args: Any, kwargs: Any) -> Any:
        """Allocate what the operation returns."""
        meta_args, meta_kwargs = tree_map(_to_meta, (args, kwargs))
        if "device" in meta_kwargs:
            meta_kwargs["device"] = "meta"

        def allocate(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)

        return tree_map(allocate, self._call(*meta_args, **meta_kwargs))

    def _compute(self, args: Any, kwargs: Any) -> Any:
        if not self._runs:
            return None
        with torch.no_grad():
            if self._name in ATTENTION:
                names = [argument.name for argument in self._operation._schema.arguments]
                return _attention("flash" in self._name, dict(zip(names, args, strict=False)) | kwargs)
            return self._call(*args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        """Run the operation. A number in place of a tensor, which PyTorch gives to kernels, takes another overload."""
        pairs = zip(self._operation._schema.arguments, args, strict=False)
        has_number = any(str(a.type) == "Tensor" and isinstance(x, (int, float, complex)) for a, x in pairs)
        return (self._operation.overloadpacket if has_number else self._operation)(*args, **kwargs)

    def _device(self, args: Any, kwargs: Any) -> torch.device:
        for value in tree_flatten((args, kwargs))[0]:
            if isinstance(value, Tensor) and value.is_cuda:
                return value.device
        device = kwargs.get("device")
        index = device.index if isinstance(device, torch.device) else None
        return torch.device("cuda", torch.cuda.current_device() if index is None else index)

    def _waits(self, args: Any) -> bool:
        if self._name in WAIT:
            return True
        if self._name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
            return False
        return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1])

    def _resize_outputs(self, args: Any, kwargs: Any) -> None:
        """Give empty results that the caller has made (out=) their shapes."""
        outputs = {a.name for a in self._operation._schema.arguments if a.kwarg_only and a.alias_info}
        empty = [name for name in outputs if isinstance(kwargs.get(name), Tensor) and not kwargs[name].numel()]
        if empty:
            meta_args, meta_kwargs = tree_map(_to_meta, (args, kwargs))
            self._call(*meta_args, **meta_kwargs)
            for name in empty:
                kwargs[name].resize_(meta_kwargs[name].shape)

    def _written(self, args: Any, kwargs: Any) -> Any:
        """Return what an operation returns that writes its arguments."""
        written = []
        for i, argument in enumerate(self._operation._schema.arguments):
            if argument.alias_info and argument.alias_info.is_write:
                written.append(kwargs[argument.name] if argument.name in kwargs else args[i])
        returned = self._operation._schema.returns
        if not returned:
            return None
        return written[0] if len(returned) == 1 else tuple(written)


def _on_host(values: Any) -> Any:
    def convert(value: Any) -> Any:
        if isinstance(value, Tensor):
            return _host_view(value) if value.is_cuda else value.clone()
        if isinstance(value, torch.Generator):
            return None
        if isinstance(value, torch.device):
            return torch.device("cpu")
        return value

    return tree_map(convert, values)


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.dim() == 0 and not value.is_cuda:
            return value  # a number
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return None if isinstance(value, torch.Generator) else value


def _host_view(tensor: Tensor) -> Tensor:
    """Return a tensor of the host in the same memory."""
    storage = tensor.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
    whole = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    empty = torch.empty(0, dtype=tensor.dtype)
    view: Tensor = empty.set_(whole, tensor.storage_offset(), tensor.shape, tensor.stride())  # type: ignore[call-overload]
    return view.conj() if tensor.is_conj() else view
