"""A vocabulary is first tried in a process of its own: what brings its library down there brings down no run.

The libraries are native code, which answers some damaged or malicious files with a segmentation fault (sentencepiece
issues 1263 and 1269), an abort, or a panic that no `except Exception` sees.
"""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
from typing import Literal

from accessory.errors import TokenizerError

_TRIALS = {
    "sentencepiece": """
from sentencepiece import SentencePieceProcessor
def use(definition, texts):
    processor = SentencePieceProcessor(model_proto=definition)
    for text in texts:
        processor.decode(processor.encode(text))
""",
    "tokenizers": """
from tokenizers import Tokenizer
def use(definition, texts):
    pipeline = Tokenizer.from_buffer(definition)
    for text in texts:
        pipeline.decode(pipeline.encode(text).ids)
""",
}
_RUN = """
import sys
texts = "a", "  The sum\\nis 1,234. ", "<s> \\u2581e\\u0301 \\u65e5\\u672c \\U0001f642\\t" + "ab" * 200, ""
try:
    use(sys.stdin.buffer.read(), texts)
except BaseException as error:
    sys.exit(" ".join(str(error).split())[:500] or type(error).__name__)
"""
_PATIENCE = 300  # seconds
_passed: set[bytes] = set()


def try_apart(library: Literal["sentencepiece", "tokenizers"], definition: bytes, refusal: str) -> None:
    """Load `definition` with `library`, encode and decode a few texts. Once for each definition; it takes 0.1 s.

    Raises TokenizerError, `refusal` followed by what came of it.
    """
    digest = hashlib.sha256(library.encode() + definition).digest()
    if digest not in _passed:
        fault = run_apart(_TRIALS[library] + _RUN, definition)
        if fault:
            raise TokenizerError(f"{refusal}, but {library} {fault}.")
        _passed.add(digest)


def run_apart(program: str, given: bytes) -> str | None:
    """Run a Python program with `given` on its standard input: None if it ends well, else what it came to."""
    command = [sys.executable, "-P", "-c", program]
    try:
        done = subprocess.run(command, input=given, capture_output=True, timeout=_PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return f"is not done with it after {_PATIENCE} s"
    if done.returncode < 0:
        return f"was brought down by it ({signal.Signals(-done.returncode).name})"
    lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"status {done.returncode}"]
    return f"cannot use it ({lines[-1]})" if done.returncode else None
