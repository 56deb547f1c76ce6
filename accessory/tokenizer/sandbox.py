"""Renders strangers' Jinja templates in a sandbox, where they reach nothing and cannot run for ever.

A checkpoint's chat template is a program that somebody else wrote. Jinja's sandbox keeps it from the objects of this
process, but does not limit time and memory. Here every loop, call, operator and output counts against a budget.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from accessory.errors import TokenizerError

_LONGEST_TEMPLATE = 200_000  # characters
_MOST_STEPS = 200_000  # loop rounds, calls and filters of one rendering
_MOST_CHARACTERS = 4_000_000  # of one value, and of all that is put out
_LARGEST_NUMBER = 2**63
_WIDEST_ARGUMENT = 1_000_000
_COUNTED, _BOUNDED = "accessory_counted", "accessory_bounded"
_LEFT_OUT = {"lipsum", "cycler", "joiner"}


class ChatTemplate:
    """A compiled template, rendered with the names that transformers gives to a chat template."""

    def __init__(self, text: str, source: str, clock: datetime | None = None) -> None:
        """`source` is named in errors; `clock` is the time for a template that prints it, absent: the present.

        Raises TokenizerError for a template that is no Jinja, or too long.
        """
        self._source, self._lock = source, threading.Lock()
        if len(text) > _LONGEST_TEMPLATE:
            raise TokenizerError(
                f"{source}: its chat template has {len(text):,} characters; expected at most {_LONGEST_TEMPLATE:,}."
            )
        self._environment = _Bounded(clock)
        try:
            self._template = self._environment.from_string(text)
        except (TemplateError, RecursionError) as error:
            raise TokenizerError(f"{source}: its chat template is no valid Jinja ({error}).") from error

    def render(self, **values: Any) -> str:
        """The text for `values`. Raises TokenizerError saying what the template did."""
        with self._lock:  # one budget, one rendering
            self._environment.refill()
            try:
                return "".join(self._template.generate(**values))
            # A template may raise whatever Python raises for its operators, attributes and calls.
            except Exception as error:
                raise TokenizerError(
                    f"{self._source}: its chat template cannot lay out the messages ({type(error).__name__}: {error})."
                ) from error


class _Bounded(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a budget of steps and characters."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, clock: datetime | None) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension])
        for name in _LEFT_OUT:
            del self.globals[name]
        self.filters["tojson"] = _tojson
        del self.filters["format"], self.filters["random"]  # a template must write the same each time
        self.filters = {name: self._watched(function) for name, function in self.filters.items()}
        self.filters |= {_COUNTED: self._counted, _BOUNDED: self._put_out}
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda layout: (clock or datetime.now()).strftime(layout),
        }
        self.refill()

    def refill(self) -> None:
        """A fresh budget."""
        self._steps, self._characters = _MOST_STEPS, _MOST_CHARACTERS

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Watch().visit(super()._parse(source, name, filename))

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A call in the template, macros included."""
        # What a method works on counts like an argument: "..." in `"...".replace(old, new)`.
        self._check_arguments((getattr(function, "__self__", None), *args, *kwargs.values()))
        return self._checked(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator in the template."""
        sizes = _size(left), _size(right)
        if operator == "%" and isinstance(left, str):
            raise SecurityError("texts are not formatted with % here; expected +, ~ or the join filter")
        if operator == "*" and not all(isinstance(value, int | float) for value in (left, right)):
            counts = [value for value in (left, right) if isinstance(value, int)]
            if max(counts, default=0) * max(sizes) > _MOST_CHARACTERS:
                raise SecurityError(f"a value grew beyond {_MOST_CHARACTERS:,} characters")
        if operator == "**" and (abs(left) > _WIDEST_ARGUMENT or abs(right) > 64):
            raise SecurityError("a number grew too large")
        return self._checked(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> None:
        """Refuse `str.format`, whose widths ask for any amount of memory."""
        if super().wrap_str_format(value) is not None:
            raise SecurityError("str.format is not open to templates here")

    def _watched(self, function: Any) -> Any:
        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            """`function`, whose arguments and result are checked."""
            self._check_arguments((*args, *kwargs.values()))
            return self._checked(function(*args, **kwargs))

        return watched

    def _check_arguments(self, values: Iterable[Any]) -> None:
        self._step()
        product = 1
        for value in values:
            if isinstance(value, int) and abs(value) > _WIDEST_ARGUMENT:
                raise SecurityError(f"{value} is asked for; expected numbers up to {_WIDEST_ARGUMENT:,}")
            product *= max(_size(value), 1)
        # No function of two texts makes more of them than each part of one for each part of the other.
        if product > _MOST_CHARACTERS * 100:
            raise SecurityError(f"a value may grow beyond {_MOST_CHARACTERS:,} characters")

    def _checked(self, value: Any) -> Any:
        if _size(value) > _MOST_CHARACTERS or (isinstance(value, int) and abs(value) > _LARGEST_NUMBER):
            raise SecurityError(f"a value grew beyond {_MOST_CHARACTERS:,} characters")
        return value

    def _counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._step()
            yield value

    def _put_out(self, value: Any) -> str:
        text = str(value)
        self._characters -= len(text)
        if self._characters < 0:
            raise SecurityError(f"it writes more than {_MOST_CHARACTERS:,} characters")
        return text

    def _step(self) -> None:
        self._steps -= 1
        if self._steps < 0:
            raise SecurityError(f"it takes more than {_MOST_STEPS:,} steps")


class _Watch(NodeTransformer):
    """Puts the budget into a parsed template: loops are counted, and what is put out is measured."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        """A loop, each round a step. One that calls itself could branch without a round of it being seen."""
        if node.recursive:
            raise SecurityError("recursive loops are not open to templates here")
        self.generic_visit(node)
        node.iter = _filtered(node.iter, _COUNTED)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        """What is put out, by the template or within a macro or block."""
        self.generic_visit(node)
        node.nodes = [
            part if isinstance(part, nodes.TemplateData) else _filtered(part, _BOUNDED) for part in node.nodes
        ]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        """`a ~ b`, which the sandbox does not intercept."""
        self.generic_visit(node)
        return _filtered(node, _BOUNDED)


class _Generation(Extension):
    """`{% generation %}`, by which templates mark the assistant's words for transformers. Here it marks nothing."""

    tags = {"generation"}  # noqa: RUF012 - so declared by Jinja

    def parse(self, parser: Any) -> list[nodes.Node]:
        """The statements between the tags."""
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _size(value: Any) -> int:
    """Characters of a text, or of all texts in a list."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list | tuple):
        return sum(len(part) + 1 if isinstance(part, str) else 1 for part in value)
    return 0


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **layout: Any) -> str:
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 16):
        raise SecurityError(f"an indent of {indent!r} is asked for; expected 0 to 16")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **layout)
