"""The sandbox of chat templates, which are untrusted programs: no way out, and a bound on time and size.

A thread cannot be killed, so a template counts instead. The environment compiles it to code that charges each loop
iteration, call, filter and output, and each character or item that an operation makes, to a budget of the render.
An operation that can multiply its input (`*`, `**`, `%`, replace, join, center and the like) is charged before it runs.
Between two charges there is at most one operation of Python on values that the budget has paid for.
Jinja's own immutable sandbox, on which it builds, bounds neither time nor size.
"""

from __future__ import annotations

import contextlib
import functools
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Set, ValuesView
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwen3fast.text.template_budget import Budget, TemplateLimitError, TemplateLimits
from qwen3fast.text.template_compiler import CountingCompiler, GenerationTag
from qwen3fast.text.template_costs import ALWAYS_LARGE, SHALLOW_FILTERS, filter_cost, method_cost, operator_cost

MAX_SOURCE_CHARS = 200_000  # compiling is not charged; the longest templates in use have about 30,000
_SEQUENCES = (list, tuple, range, Set, ValuesView)
UNITS_PER_ITEM = 8  # an item of a list takes the memory of about eight characters


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up for chat templates, with a budget. Thread-safe.

    Left out of Jinja, because no chat template needs them and their cost has no simple bound: lipsum and the filters
    pprint, urlize, wordwrap and xmlattr.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=[jinja2.ext.loopcontrols, GenerationTag],
            finalize=self.check_value,
        )
        self.code_generator_class = CountingCompiler
        self.concat = self._join  # type: ignore[method-assign]
        self._of_thread = threading.local()
        for name in ("pprint", "urlize", "wordwrap", "xmlattr"):
            del self.filters[name]
        self.filters = {name: self._counted_filter(name, f) for name, f in self.filters.items()}
        self.filters |= {"tojson": self._tojson, **{name: getattr(self, name) for name in _INTERNAL}}
        del self.globals["lipsum"]
        # Functions instead of the types, whose unbound methods would reach around the sandbox.
        self.globals["dict"] = self._dict
        self.globals["namespace"] = lambda *items, **entries: _Namespace(*items, **entries)
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda format: datetime.now().strftime(format)

    def render(self, template: jinja2.Template, limits: TemplateLimits, variables: dict[str, Any]) -> str:
        """Return the rendered text.

        Raises: TemplateLimitError; or whatever the template raises.
        """
        with self._budget_of(limits):
            return template.render(variables)

    def load(self, source: str, limits: TemplateLimits) -> jinja2.Template:
        """Compile a template. Jinja computes constant expressions then, within a budget of their own.

        Raises: TemplateLimitError for a source of more than MAX_SOURCE_CHARS; jinja2.TemplateError; RecursionError.
        """
        if len(source) > MAX_SOURCE_CHARS:
            raise TemplateLimitError(
                f"has {len(source)} characters; templates of up to {MAX_SOURCE_CHARS} are compiled"
            )
        with self._budget_of(limits):
            return self.from_string(source)

    # What compiled templates call

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Refuse also what makes large values of small ones: see `ALWAYS_LARGE`."""
        if isinstance(obj, int | float | bytes) or (isinstance(obj, str) and attr in ALWAYS_LARGE):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute `left operator right`, charged before and checked after."""
        self._charge(operator_cost(operator, left, right, self._size))
        return self._checked(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call a function or method, charged before and checked after."""
        args, kwargs = __self._listed(args, kwargs)
        __self._charge(method_cost(__obj, args, kwargs, __self._size))
        return __self._checked(super().call(__context, __obj, *args, **kwargs))

    def count_items(self, items: Iterable[Any]) -> Iterator[Any]:
        """Yield the items of a loop and charge each."""
        for item in items:
            self._charge(1)
            yield item

    def check_value(self, value: Any) -> Any:
        """Return a value that the template writes, or a container that it has just made, charged by its size."""
        self._size(value)
        return value

    def join_values(self, values: list[Any]) -> str:
        """Return what `a ~ b` is."""
        return self._join(str(self.check_value(value)) for value in values)

    # The budget

    @contextlib.contextmanager
    def _budget_of(self, limits: TemplateLimits) -> Iterator[None]:
        self._of_thread.budget = Budget(limits)
        try:
            yield
        finally:
            del self._of_thread.budget

    def _charge(self, units: int) -> None:
        self._of_thread.budget.charge(units)

    def _size(self, value: Any) -> int:
        """Charge a value's characters and items, however often they occur in it. Returns their number."""
        total, left = 0, [value]
        while left:
            item = left.pop()
            units = len(item) + 1 if isinstance(item, str) else 1
            if isinstance(item, Mapping):
                left += item
                left += item.values()
            if isinstance(item, (Mapping, jinja2.runtime.LoopContext, *_SEQUENCES)):  # a filter may join a loop
                units += UNITS_PER_ITEM * len(item)
            if isinstance(item, _SEQUENCES):
                left += item
            self._charge(units)
            total += units
        return total

    def _checked(self, value: Any) -> Any:
        """Return the result of an operation, charged by its length."""
        if isinstance(value, int) and value.bit_length() > 4096:
            raise TemplateLimitError("made a number of more than 4096 bits")
        if isinstance(value, str | list | tuple | Mapping):
            self._charge(len(value) * (1 if isinstance(value, str) else UNITS_PER_ITEM))
        return value

    def _join(self, pieces: Iterable[str]) -> str:
        budget, joined, length = self._of_thread.budget, [], 0
        for piece in pieces:
            length += len(piece)
            budget.charge(1)
            budget.check_length(length)
            joined.append(piece)
        return "".join(joined)

    def _listed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return arguments with iterators (of filters such as `map`) read into lists, charged item by item."""
        return tuple(self._list(x) for x in args), {name: self._list(x) for name, x in kwargs.items()}

    def _list(self, value: Any) -> Any:
        if not isinstance(value, Iterator) or isinstance(value, jinja2.runtime.LoopContext):
            return value
        items = []
        for item in value:
            self._size(item)
            items.append(item)
        return items

    def _counted_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        first = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = self._listed(args, kwargs)
            value, *rest = args[first:] or (None,)
            size = 1 if name in SHALLOW_FILTERS else self._size(value)
            self._charge(filter_cost(name, value, rest, kwargs, size, self._size))
            return self._checked(function(*args, **kwargs))

        return counted

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes HTML; templates expect plain JSON.
        self._size(value)
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        if len(str(separators)) > 100 or len(str(indent)) > 100 or (isinstance(indent, int) and indent > 100):
            raise TemplateLimitError("asked for JSON with an indent or separators of more than 100 characters")
        return self._join(encoder.iterencode(value))

    def _dict(self, *items: Any, **entries: Any) -> dict[Any, Any]:
        made = dict(*items, **entries)
        self._size(made)
        return made


_INTERNAL = ("count_items", "check_value", "join_values")


class _Namespace(jinja2.utils.Namespace):
    """A namespace whose text does not show its values, which may hold each other many times."""

    def __repr__(self) -> str:
        return "<Namespace>"


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
