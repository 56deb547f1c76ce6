"""Imports run downward only, and in no circle, those inside functions and for type hints included."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TIERS = (
    ("__main__", "main_finetune", "main_pretrain", "demos", "tools"),
    ("finetuning", "pretraining", "export", "entry", "hugging_face", ""),
    ("training",),
    ("engine", "conversation", "eval", "multi_gpu"),
    ("meta", "run"),
    ("blueprint", "config", "generate", "memory", "quantizer"),
    ("checkpoint",),
    ("method",),
    ("vision",),
    ("model", "optim"),
    ("data", "quant"),
    ("kernels", "tokenizer", "parallel"),
    ("foreign_names",),
    ("errors",),
)
"""Rooms of the house, the highest first: each imports from those below it only, not from its neighbours either. The
one without a name is `accessory/__init__.py`, which gives `MetaModel` on first use."""
APART = {"quant": {"parallel"}, "engine": {"model", "method", "quant", "kernels", "tokenizer"}}
"""What a room does not know although it lies below."""
UPSTREAMS = ("accessory.model.meta", "accessory.model.multi_gpu_wrapper")
"""Modules that only give a public name where LLaMA2-Accessory has it: they belong to the public names."""
MOST_AT_THE_ROOT = 15


def modules() -> dict[str, str]:
    """Dotted name -> source of every module."""
    found = {}
    for top in ("accessory", "demos", "tools"):
        for path in (ROOT / top).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return found


def imports(source: str, known: set[str]) -> Iterator[str]:
    """Dotted names of the `known` modules that `source` imports, wherever it does."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in known else node.module for name in names if {name, node.module} & known)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)


def faults(sources: dict[str, str]) -> list[str]:
    """A line for each import that does not run downward, and for a circle."""
    tier = {room: place for place, rooms in enumerate(TIERS) for room in rooms}
    graph = {name: set(imports(source, set(sources))) - {name} for name, source in sources.items()}
    found = []
    for name, targets in sorted(graph.items()):
        for target in sorted(targets):
            above, below = _room(name), _room(target)
            upward = above != below and tier.get(above, len(TIERS)) >= tier.get(below, -1)
            if upward or below in APART.get(above, ()):
                found.append(f"{name} imports {target}")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"circle: {' <- '.join(error.args[1])}")
    return found


def _room(name: str) -> str:
    if name in UPSTREAMS:
        return ""
    top, _, rest = name.partition(".")
    return rest.partition(".")[0] if top == "accessory" else top


def test_imports_run_downward_and_in_no_circle() -> None:
    assert not faults(modules())


@pytest.mark.parametrize(("name", "source", "fault"), [
    ("accessory.model.x", "from accessory.method.y import z", "accessory.model.x imports accessory.method.y"),
    ("accessory.model.x", "def f():\n    from accessory import method", "accessory.model.x imports accessory.method"),
    ("accessory.data.x", "import accessory.quant", "accessory.data.x imports accessory.quant"),
    ("accessory.quant.x", "from accessory.parallel import groups", "accessory.quant.x imports accessory.parallel"),
    ("accessory.new.x", "from accessory.errors import A", "accessory.new.x imports accessory.errors"),
    ("accessory.method", "from accessory.method.y import z", "circle: accessory.method <- accessory.method.y"),
])  # fmt: skip
def test_each_kind_of_fault_is_found(name: str, source: str, fault: str) -> None:
    """The last but one: a room that nobody put into a tier."""
    there = dict.fromkeys(("accessory.method", "accessory.quant", "accessory.parallel", "accessory.errors"), "")
    found = faults(there | {"accessory.method.y": "import accessory.method", name: source})
    assert any(line.startswith(fault) for line in found), found


def test_few_files_at_the_root() -> None:
    assert len(list((ROOT / "accessory").glob("*.py"))) <= MOST_AT_THE_ROOT
