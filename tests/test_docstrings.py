"""Every module says what it is for, and every public function, class and method what it does, nested ones included."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.test_imports import modules

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def undocumented(name: str, source: str) -> Iterator[str]:
    """Lines that name what has no docstring in the module `name`; what begins with an underscore needs none."""
    tree = ast.parse(source)
    if ast.get_docstring(tree) is None:
        yield f"{name} has no docstring"
    for node in ast.walk(tree):
        if isinstance(node, DEFINITIONS) and not node.name.startswith("_") and not ast.get_docstring(node):
            yield f"{name}, line {node.lineno}: {node.name} has no docstring"


def test_all_is_documented() -> None:
    assert not [line for name, source in modules().items() for line in undocumented(name, source)]


@pytest.mark.parametrize(("source", "found"), [
    ("x = 1", ["m has no docstring"]),
    ('"""M."""\ndef f():\n    pass', ["m, line 2: f has no docstring"]),
    ('"""M."""\nclass _A:\n    async def f(self):\n        ""', ["m, line 3: f has no docstring"]),
    ('"""M."""\ndef f():\n    """F."""\n    def g(): pass\n    def _h(): pass', ["m, line 4: g has no docstring"]),
])  # fmt: skip
def test_what_is_missing_is_found(source: str, found: list[str]) -> None:
    assert list(undocumented("m", source)) == found
