"""The order of the package: imports go downwards only, and it can be read from the bottom to the top."""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import qwen3fast
from qwen3fast.cli.program import COMMANDS

PACKAGE = Path(qwen3fast.__file__).parent

# Each part may import the parts before it. "qwen3fast" is the package's own __init__.
ORDER = [
    "_version",
    "files",
    "reference",
    "checks",
    "kernels",
    "model",
    "quantization",
    "parallel",
    "text",
    "sampling",
    "checkpoint",
    "engine",
    "sampling_params",
    "results",
    "options",
    "scheduling",
    "calibrated",
    "loading",
    "text_model",
    "embedder",
    "reranker",
    "classifier",
    "adapter_methods",
    "chat_methods",
    "generator",
    "chat_session",
    "lm_eval",
    "qwen3fast",
    "server",
    "bench",
    "cli",
    "__main__",
]


def modules() -> dict[str, Path]:
    """Dotted names of all modules of the package and their files."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = ["qwen3fast", *file.relative_to(PACKAGE).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in MODULES.items()}


@cache
def nodes_of(module: str) -> list[ast.AST]:
    """All nodes of a module: many tests look at them, and walking takes long."""
    return list(ast.walk(TREES[module]))


def part_of(module: str) -> str:
    """The part of ORDER that a module belongs to."""
    names = module.split(".")
    return names[1] if len(names) > 1 else names[0]


def own_imports(module: str, tree: ast.AST) -> set[str]:
    """Modules of the package that the code of `tree`, inside `module`, imports."""
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if MODULES[module].name == "__init__.py" else module.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            # `from package import name` imports the module of that name if there is one.
            imported |= {f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names}
    return {name for name in imported if name.split(".")[0] == "qwen3fast"}


def own_imports_at_the_top(module: str, tree: ast.Module) -> set[str]:
    """Modules of the package that are imported when the module is."""
    statements = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return own_imports(module, ast.Module(statements, []))


def imported_packages(tree: ast.Module) -> set[str]:
    """Top-level names of what the file imports at its top."""
    imports = [node for node in tree.body if isinstance(node, ast.Import)]
    return {alias.name.split(".")[0] for node in imports for alias in node.names}


def top_level(tree: ast.Module) -> ast.Module:
    """Return a module of the import statements that run when it is imported."""
    return ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])


def names_imported(node: ast.AST) -> list[str]:
    """Return the modules that an import statement names, except relative to its own."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []


IMPORTS = {name: own_imports(name, tree) for name, tree in TREES.items()}


def test_imports_are_found_at_all():
    assert "qwen3fast.model.rope" in IMPORTS["qwen3fast.model.attention"]


def test_imports_every_part_has_a_place_in_the_order():
    assert {part_of(name) for name in MODULES} - set(ORDER) == set()


def test_imports_go_downwards():
    upwards = [
        f"{module} imports {target}"
        for module, targets in IMPORTS.items()
        for target in targets
        if part_of(module) != part_of(target) and ORDER.index(part_of(target)) > ORDER.index(part_of(module))
    ]
    assert upwards == []


def test_imports_have_no_cycle():
    try:
        tuple(TopologicalSorter(IMPORTS).static_order())
    except CycleError as error:
        pytest.fail(f"modules import each other: {error.args[1]}")


def test_imports_of_the_model_leave_the_engine_out():
    from_engine = {m: t for m, t in IMPORTS.items() if part_of(m) == "model" and any("engine" in name for name in t)}
    assert from_engine == {}


def test_imports_of_the_model_are_torch_and_attention():
    """The model is read with PyTorch in mind alone: of kernels, it knows attention over a cache, and PyTorch's."""
    nodes = [node for module in TREES if part_of(module) == "model" for node in nodes_of(module)]
    outside = {name for node in nodes for name in names_imported(node) if not name.startswith("qwen3fast.model")}
    packages = {name.split(".")[0] for name in outside} - sys.stdlib_module_names
    assert packages == {"torch", "qwen3fast"}
    assert {name for name in outside if name.startswith("qwen3fast")} == {"qwen3fast.kernels.attention"}
    from_kernels = [n for n in nodes if isinstance(n, ast.ImportFrom) and n.module == "qwen3fast.kernels.attention"]
    names = [alias.name for node in from_kernels for alias in node.names]
    assert names == ["cached_attention"]


def test_no_two_classes_have_one_name():
    """Except in reference.py, whose classes are the model's in one file."""
    modules = [module for module in TREES if part_of(module) != "reference"]
    names = [node.name for module in modules for node in nodes_of(module) if isinstance(node, ast.ClassDef)]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []


def test_imports_of_the_bench_come_from_itself_and_the_command_line():
    importers = {part_of(m) for m, targets in IMPORTS.items() if any(part_of(t) == "bench" for t in targets)}
    assert importers <= {"bench", "cli"}


def test_imports_of_our_own_stand_at_the_top_of_the_file():
    # Except modules that need a package which may be missing, directly or through what they import.
    optional = {m for m, tree in TREES.items() if "triton" in imported_packages(tree) or part_of(m) == "server"}
    while more := {m for m, tree in TREES.items() if m not in optional and own_imports_at_the_top(m, tree) & optional}:
        optional |= more
    inside = [
        f"{module}.{node.name} imports {', '.join(sorted(targets))}"
        for module in TREES
        for node in nodes_of(module)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (targets := own_imports(module, node) - optional)
    ]
    assert inside == []


# Modules that import others by name when they are needed, which the checks above do not see.
BY_NAME = {
    "qwen3fast": {f"qwen3fast.{name}" for name in qwen3fast._MODULES.values()},
    "qwen3fast.__main__": {"qwen3fast.cli"},
    "qwen3fast.bench.view": {f"qwen3fast.bench.{name}" for name in ("plot", "pictures", "report.page")},
    "qwen3fast.cli.program": {command.module for command in COMMANDS.values()},
}


def test_imports_by_name_are_the_stated_ones():
    importers = {
        module
        for module in TREES
        for node in nodes_of(module)
        if (isinstance(node, ast.Name) and node.id in ("import_module", "__import__"))
        or (isinstance(node, ast.Attribute) and node.attr == "import_module")
    }
    assert importers == set(BY_NAME)
    assert {target for targets in BY_NAME.values() for target in targets} - set(MODULES) == set()
    assert not [m for m, file in MODULES.items() if "importlib.import_module" in file.read_text(encoding="utf-8")]


def test_imports_by_name_have_stubs_with_the_same_names():
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    names = {alias.asname: node.module for node in stub.body for alias in node.names}
    expected = {name: f"qwen3fast.{module}" for name, module in qwen3fast._MODULES.items()}
    assert names == {**expected, "__version__": "qwen3fast._version"}
    assert sorted(qwen3fast.__all__) == sorted(names)
    for name in qwen3fast.__all__:
        assert getattr(qwen3fast, name) is not None and name in dir(qwen3fast)
    with pytest.raises(AttributeError, match="has no attribute 'Generater'"):
        qwen3fast.Generater  # noqa: B018


def test_imports_of_the_server_come_from_itself_and_optional_extras():
    importers = {m for m, targets in IMPORTS.items() if any(part_of(t) == "server" for t in targets)}
    outside = {m for m in importers if part_of(m) != "server"}
    assert outside <= {"qwen3fast.bench.suites.serve"}
    at_the_top = [m for m in outside if any(part_of(t) == "server" for t in own_imports(m, top_level(TREES[m])))]
    assert at_the_top == []  # the command line works without the extra


@pytest.mark.parametrize("package", ["starlette", "uvicorn", "prometheus_client"])
def test_imports_of_web_packages_stay_in_the_server(package):
    importers = {
        part_of(m)
        for m in TREES
        for node in nodes_of(m)
        if package in {name.split(".")[0] for name in names_imported(node)}
    }
    assert importers == {"server"}


def test_imports_name_what_they_import():
    starred = [
        module
        for module in TREES
        for node in nodes_of(module)
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
    ]
    assert starred == []


def test_imports_of_other_packages_are_declared():
    declared = re.findall(
        r'^ *"([\w-]+)', (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
    )
    names = {name.split(".")[0] for module in TREES for node in nodes_of(module) for name in names_imported(node)}
    others = names - sys.stdlib_module_names - {"qwen3fast"}
    assert {name.replace("_", "-") for name in others} <= {name.replace("_", "-") for name in declared}


def test_imports_do_not_hide_behind_type_checking():
    hidden = [
        m for m in TREES if any(isinstance(node, ast.Name) and node.id == "TYPE_CHECKING" for node in nodes_of(m))
    ]
    assert hidden == []


def private_names_of_torch(module: str) -> set[str]:
    """Return the private parts of dotted names that begin with `torch`, imported ones included."""
    names = {ast.unparse(node) for node in nodes_of(module) if isinstance(node, ast.Attribute)}
    names |= {name for node in nodes_of(module) for name in names_imported(node)}
    dotted = {name for name in names if name.split(".")[0] == "torch"}
    return {part for name in dotted for part in name.split(".") if part.startswith("_") and not part.startswith("__")}


def test_private_parts_of_pytorch_are_used_in_one_file():
    found = {module: names for module in TREES if (names := private_names_of_torch(module))}
    described = ast.get_docstring(TREES["qwen3fast.engine.compile"]) or ""
    assert all(name in described for name in found.pop("qwen3fast.engine.compile") - {"_inductor", "_C"})
    operators = {
        "attention": "_scaled_dot_product_flash_attention",
        "grouped": "_grouped_mm",
    }  # without public names in torch 2.9
    assert found == {f"qwen3fast.kernels.{module}": {name} for module, name in operators.items()}
