"""llama.cpp as a client of the files we write: its own library, in one process for all of a session's tests."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_suffix(".mjs")


class Refused(Exception):
    """What llama.cpp says of a file that it does not load, or of a text that it cannot encode."""


class LlamaCpp:
    """The process that runs llama.cpp; close it in the end."""

    def __init__(self, library: Path) -> None:
        """`library` is the directory of llama.cpp's library and its add-on for Node."""
        command = ["node", str(SCRIPT), str(library)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )

    def ask(
        self,
        file: Path,
        *,
        texts: Sequence[str] = (),
        marked: Sequence[str] = (),
        prompts: Sequence[Sequence[int]] = (),
        steps: int = 1,
        ids: Sequence[int] = (),
    ) -> dict[str, Any]:
        """Load `file`, its vocabulary alone where there are no prompts. Raises `Refused`, with what was logged.

        texts: ids of each, nothing added; marked: the same with control tokens that a text spells recognized.
        answers: for each prompt (ids) the `ids` of `steps` greedy tokens, and the `probabilities` of the first, [V].
        opening: ids that llama.cpp puts before a text. ends: those of `ids` that end an answer. words: their text.
        """
        question = {
            "file": str(file), "texts": list(texts), "marked": list(marked),
            "prompts": [list(map(int, prompt)) for prompt in prompts], "steps": steps, "ids": list(ids),
        }  # fmt: skip
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise Refused(f"{file}: the process ended with status {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise Refused(f"{file}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait(timeout=30)


def find_library() -> Path | str:
    """Where tests/run.sh has put llama.cpp, or why it cannot be asked."""
    if shutil.which("node") is None:
        return "node is not installed"
    found = sorted(Path(sys.prefix).glob("llama.cpp/node_modules/@node-llama-cpp/*/bins/*/llama-addon.node"))
    return (
        found[0].parent if found else "tests/run.sh has not installed it: see install_llama_cpp in exps/environment.sh"
    )
