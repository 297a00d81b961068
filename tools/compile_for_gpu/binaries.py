"""Resources of machine code, and the work of a kernel before it waits for the previous one."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton.backends.nvidia

CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
WAIT, LAUNCH = "griddepcontrol.wait", "griddepcontrol.launch_dependents"
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def resources(cubin: bytes) -> dict[str, int]:
    """Return the registers of a thread and the bytes of its stack, where registers are spilled to, of one kernel.

    Source: `cuobjdump -res-usage`, which comes with Triton.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([str(CUOBJDUMP), "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = RESOURCES.search(done.stdout)
    assert found is not None, f"cuobjdump printed no resources: {done.stdout[-300:]}"
    registers, stack, _, local = map(int, found.groups())
    return {"registers": registers, "spill_bytes": stack + local}


def waits_of(ptx: str) -> dict[str, Any]:
    """Return what a kernel does for programmatic dependent launch.

    Returns: whether it `waits` for the kernels before it, whether it lets the next one `launch` early, also before its
    own wait, and how many loads and stores of global memory stand before the wait (all of them if there is none).
    """
    before, wait, _ = ptx.partition(WAIT)
    return {
        "waits": bool(wait),
        "launches_dependents": LAUNCH in ptx,
        "launches_before_wait": LAUNCH in before,
        "loads_before_wait": len(re.findall(r"\bld\.global", before)) + before.count("cp.async"),
        "stores_before_wait": len(re.findall(r"\b(?:st|red|atom)\.global", before)),
    }


def describe_kernel(name: str, compiled: Any) -> dict[str, Any]:
    """Return name, shared memory, registers, spills and waits of a kernel that Triton has compiled."""
    facts = {"name": name, "shared_bytes": compiled.metadata.shared, "cubin_bytes": len(compiled.asm["cubin"])}
    facts |= resources(compiled.asm["cubin"])
    return facts | {"launch_pdl": bool(getattr(compiled.metadata, "launch_pdl", False))} | waits_of(compiled.asm["ptx"])


def is_unsafe(kernel: dict[str, Any]) -> bool:
    """Return whether a kernel may start before the ones it depends on have ended, and does not wait for them.

    Inductor's kernels (named triton_*) load before their wait what the kernel just before them has not written. That
    holds only if that kernel, which is Inductor's as well, let them start after its own wait. Before the first kernel
    of a part is another part's, whose writes Inductor does not know. Ours load weights alone.
    """
    is_early = kernel["name"].startswith("triton_") and kernel.get("launches_before_wait", False)
    is_early |= kernel.get("is_first", False) and kernel["loads_before_wait"] > 0
    return bool(kernel["launch_pdl"]) and (not kernel["waits"] or kernel["stores_before_wait"] > 0 or is_early)
