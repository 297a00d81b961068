"""Every kernel is launched with its tensors' device as the current one: Triton takes the current device."""

import ast
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the triton package is not installed")

from qwen3fast.kernels import cuda

FILES = sorted(Path(cuda.__file__).parent.rglob("*.py"))


def launches(source):
    """Return the line of each `kernel[grid](...)`, and whether it is in a block `with current(...)`."""
    tree, guarded = ast.parse(source), set()
    for block in ast.walk(tree):
        names = [ast.unparse(item.context_expr) for item in getattr(block, "items", [])]
        if isinstance(block, ast.With) and any(name.startswith("current(") for name in names):
            guarded |= {id(node) for node in ast.walk(block)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)]
    return [(node.lineno, id(node) in guarded) for node in calls if not ast.unparse(node).startswith("dict[")]


def test_a_launch_outside_of_the_block_is_found():
    assert launches("kernel[grid](x)\nwith current(x.device):\n    kernel[grid](x)") == [(1, False), (3, True)]


def test_every_kernel_is_launched_on_the_device_of_its_tensors():
    found = {file.name: launches(file.read_text(encoding="utf-8")) for file in FILES}
    assert sum(map(len, found.values())) >= 6
    assert [(name, line) for name, lines in found.items() for line, is_guarded in lines if not is_guarded] == []
