"""Jinja's compiler for chat templates: loops and literals become calls of the environment, which charges them."""

from __future__ import annotations

from typing import Any

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.visitor


class CountingCompiler(jinja2.compiler.CodeGenerator):
    """Jinja's compiler, on a syntax tree whose loops and literals go through the environment."""

    def visit_Template(self, node: jinja2.nodes.Template, frame: Any = None) -> None:  # noqa: N802
        super().visit_Template(_Rewriter(self.environment).visit(node), frame)


class _Rewriter(jinja2.visitor.NodeTransformer):
    """A rewriter that puts internal filters around nodes which Jinja compiles to plain Python."""

    def __init__(self, environment: jinja2.Environment) -> None:
        self._environment = environment

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:  # noqa: N802
        node = self.generic_visit(node)  # type: ignore[assignment]
        node.iter = self._filtered(node.iter, "count_items")
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:  # noqa: N802
        node = self.generic_visit(node)  # type: ignore[assignment]
        return self._filtered(jinja2.nodes.List(node.nodes, lineno=node.lineno), "join_values")

    def visit_List(self, node: Any) -> jinja2.nodes.Node:  # noqa: N802
        return self._filtered(self.generic_visit(node), "check_value")

    visit_Dict = visit_List

    def visit_Tuple(self, node: jinja2.nodes.Tuple) -> jinja2.nodes.Node:  # noqa: N802
        return self.generic_visit(node) if node.ctx != "load" else self.visit_List(node)

    def visit_Getitem(self, node: jinja2.nodes.Getitem) -> jinja2.nodes.Node:  # noqa: N802
        return self.visit_List(node) if isinstance(node.arg, jinja2.nodes.Slice) else self.generic_visit(node)

    def _filtered(self, node: Any, name: str) -> jinja2.nodes.Filter:
        filtered = jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
        return filtered.set_environment(self._environment)  # type: ignore[return-value]


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 (declared so by the base class)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
