"""Would a test notice?  Every small change to a file (mutmut's operators make them) against its tests, from the root:

python tools/mutation.py accessory/data/order.py tests/data/test_order.py --then tests/data
"""

from __future__ import annotations

import contextlib
import difflib
import gc
import importlib.util
import inspect
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import libcst
import pytest
from _pytest.main import pytest_runtestloop
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.file_mutation import NEVER_MUTATE_FUNCTION_CALLS
from mutmut.mutation.mutators import mutation_operators

from accessory.entry import from_command_line, run_tool
from accessory.errors import ConfigError

LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "output")
"""Files of the working tree that no test needs."""
PATIENCE = 10
"""A mutant gets this many times the seconds that its tests take without it, and 5 more."""
MOST_MEMORY = 8 << 30
"""Bytes that a mutant's process may take: an endless loop may also grow without end."""


@dataclass(frozen=True)
class Mutant:
    """A file with one thing changed."""

    number: int
    line: int
    in_function: bool
    module: libcst.Module
    node: libcst.CSTNode
    other: libcst.CSTNode

    @cached_property
    def code(self) -> str:
        """All of the file."""
        return self.module.deep_replace(self.node, self.other).code

    def beside(self, original: str) -> str:
        """Which it is, and the lines that differ."""
        _, _, *lines = difflib.unified_diff(original.splitlines(), self.code.splitlines(), n=0, lineterm="")
        return "\n".join([f"mutant {self.number}, line {self.line}:", *(line for line in lines if line[0] != "@")])


class _Sites(libcst.CSTVisitor):
    """Finds (line, whether in a function, node, what it becomes).

    Annotations do nothing; changed decorators break imports.
    """

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, bool, libcst.CSTNode, libcst.CSTNode]] = []
        self.functions = 0

    def on_visit(self, node: libcst.CSTNode) -> bool:
        """Note every mutation of this node; whether its children are visited."""
        if isinstance(node, libcst.Annotation | libcst.Decorator):
            return False
        left_alone = isinstance(node, libcst.Call) and getattr(node.func, "value", None) in NEVER_MUTATE_FUNCTION_CALLS
        for kind, operator in mutation_operators:
            if isinstance(node, kind) and not left_alone:
                line = self.get_metadata(PositionProvider, node).start.line
                self.found += [(line, self.functions > 0, node, other) for other in operator(node)]
        self.functions += isinstance(node, libcst.FunctionDef)
        return True

    def on_leave(self, node: libcst.CSTNode) -> None:
        """Leave a function, if the node is one."""
        self.functions -= isinstance(node, libcst.FunctionDef)


def mutants(code: str) -> Iterator[Mutant]:
    """All of `code`, numbered from 0 in its order."""
    wrapper, sites = MetadataWrapper(libcst.parse_module(code)), _Sites()
    wrapper.visit(sites)
    for number, (line, in_function, node, other) in enumerate(sites.found):
        yield Mutant(number, line, in_function, wrapper.module, node, other)


class Project:
    """A copy of the current directory whose files may be changed, and its tests.

    Tests run in forks of this process, which by then has imported all that they need from elsewhere.
    """

    def __init__(self, root: Path) -> None:
        shutil.copytree(Path.cwd(), root, ignore=LEFT_OUT, symlinks=True)
        self.root, self.patience = root, None
        sys.path[0] = os.environ["PYTHONPATH"] = str(root)
        for name in [name for name in sys.modules if self._holds(name)]:
            del sys.modules[name]  # this tool imported it, not from the copy

    def prepare(self, tests: list[str]) -> None:
        """Run `tests` without a mutant, and once more as mutants will. Raises `ConfigError` where they fail."""
        for _ in range(2):
            begun = time.monotonic()
            if self.end(tests, self.patience):
                said = (self.root / "said").read_text(errors="replace")
                raise ConfigError(f"{' '.join(tests)}: fails without a mutant, too.\n{said[-3000:]}")
            self.patience = PATIENCE * (time.monotonic() - begun) + 5
            for name in (self.root / "imported").read_text().split():
                with contextlib.suppress(Exception):  # some modules cannot be imported by themselves
                    importlib.import_module(name)
        gc.freeze()  # a fork that collected garbage would copy the memory it shares
        # Python tells compiled files apart by size and second: one mutant could pass for another.
        os.environ["PYTHONDONTWRITEBYTECODE"], sys.dont_write_bytecode = "1", True

    def ends_in_place(self, tests: list[str], file: Path, code: str, tried: list[Mutant]) -> dict[int, str]:
        """What ends which mutant, empty for one that survives, as far as `InPlace` can tell."""
        ends = self.root / "ends"
        ends.write_text("{}")
        self.end(tests, None, InPlace(file, tried, self.patience, ends))
        (self.root / file).write_text(code)
        return {int(number): end for number, end in json.loads(ends.read_text()).items()}

    def end(self, tests: list[str], patience: float | None, *plugins: object) -> str:
        """What ends `tests`, "a test" or "the clock"; empty where all pass."""

        def run() -> int:
            """Run the tests in the copy of the tree; pytest's exit status."""
            os.chdir(self.root)
            with open("said", "wb") as said:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
            status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--basetemp=tmp", *tests], plugins)
            Path("imported").write_text("\n".join(name for name in sys.modules if not self._holds(name)))
            return status

        return end_of(run, patience)

    def _holds(self, module: str) -> bool:
        top = self.root / module.split(".")[0]
        return top.is_dir() or top.with_suffix(".py").is_file()


class InPlace:
    """A plugin of pytest: collects tests once, and runs them on each mutant in a fork that has put its functions in.

    What does not lie in functions (constants, what a class is made of) is not put in everywhere: of such a mutant this
    shows only that it fails. What ended which, by its number, is written to the file `ends`.
    """

    def __init__(self, file: Path, mutants: list[Mutant], patience: float, ends: Path) -> None:
        self.file, self.mutants, self.patience, self.ends = file, mutants, patience, ends

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """In place of pytest's, of the same name."""
        name = ".".join(self.file.with_suffix("").parts)
        module = sys.modules.get(name)

        def run() -> int:
            """Run the tests on a mutant of the module; the number that failed."""
            spec = importlib.util.spec_from_file_location(name, self.file)
            new = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(new)
            put_in(module, new, name)
            pytest_runtestloop(session)
            return session.testsfailed

        gc.freeze()
        if module and not end_of(run, self.patience):
            ends = {}
            for mutant in self.mutants:
                self.file.write_text(mutant.code)
                end = end_of(run, self.patience)
                if end or mutant.in_function:
                    ends[mutant.number] = end
            self.ends.write_text(json.dumps(ends))
        return True


def put_in(old: object, new: object, module: str) -> None:
    """Have the functions of `module`, or of a class in it, do what those of `new` do, wherever they were imported."""
    for name, value in vars(new).items():
        known, value = _bare(vars(old).get(name)), _bare(value)
        if inspect.isfunction(known) and inspect.isfunction(value):
            for part in ("__code__", "__defaults__", "__kwdefaults__"):
                setattr(known, part, getattr(value, part))
        elif inspect.isclass(value):
            if inspect.isclass(known) and known is not value and value.__module__ == module:
                put_in(known, value, module)
        elif not name.startswith("__") and not hasattr(type(value), "__get__"):
            setattr(old, name, value)


def _bare(value: object) -> object:
    """The plain function within a property, a class method or a decorated function."""
    return inspect.unwrap(getattr(value, "fget", None) or getattr(value, "__func__", value))


def end_of(run: Callable[[], int], patience: float | None) -> str:
    """What ends `run` in a fork of this process, "a test" or "the clock"; empty where it returns 0."""

    def alone() -> None:
        """Run in a session and with memory of its own, then leave the process with the status."""
        os.setsid()
        resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
        status = run()
        sys.stdout.flush()
        os._exit(status)  # without freeing what torch holds

    child = multiprocessing.get_context("fork").Process(target=alone)
    child.start()
    child.join(patience)
    late = child.is_alive()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # and what it started
    child.join()
    return "the clock" if late else "a test" if child.exitcode else ""


def main(
    file: str,
    *tests: str,
    deselect: str | tuple[str, ...] = (),
    then: str | tuple[str, ...] = (),
    only: int | tuple[int, ...] = (),
    every: int = 1,
) -> None:
    """Print the mutants of FILE that TESTS do not notice, and how many there are.

    Args:
        file: a Python file.
        tests: its fast tests, files or pytest's names; the first that fails ends a mutant.
        deselect: slow ones among them, left out, separated by commas.
        then: tests for the mutants that survive those, separated by commas.
        only: numbers of the mutants to try, as they are printed, separated by commas.
        every: try one mutant in so many.
    """
    path = Path(file)
    if not path.is_file() or not tests:
        raise ConfigError(f"{file} {' '.join(tests)}: expected a Python file and at least one file of tests.")
    fast, numbers = [*tests, *(f"--deselect={name}" for name in _several(deselect))], set(_several(only))
    with tempfile.TemporaryDirectory() as directory:
        project = Project(Path(directory) / "project")
        code = (project.root / path).read_text()
        left = [m for m in mutants(code) if (m.number in numbers if numbers else m.number % every == 0)]
        ends, tried = Counter(), len(left)
        for chosen in filter(None, (fast, _several(then))):
            (project.root / path).write_text(code)
            project.prepare(chosen)
            found, survivors = project.ends_in_place(chosen, path, code, left), []
            for mutant in left:
                end = found.get(mutant.number)
                if end is None:
                    (project.root / path).write_text(mutant.code)
                    end = project.end(chosen, project.patience)
                if end:
                    ends[end] += 1
                else:
                    survivors.append(mutant)
                    print(mutant.beside(code), flush=True)
            left = survivors
            print(
                f"{file}: of {tried} mutants {ends['a test']} were ended by a test, {ends['the clock']} by the clock; "
                f"{len(left)} survive {' '.join(chosen)}.",
                flush=True,
            )


def _several(given: int | str | tuple) -> list:
    """What fire makes of a flag whose values are separated by commas: a tuple, or the only one."""
    return list(given) if isinstance(given, tuple) else [given]


if __name__ == "__main__":
    run_tool(from_command_line(main))
