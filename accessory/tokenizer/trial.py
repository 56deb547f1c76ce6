"""Tries a vocabulary in a subprocess first, so that a file which crashes its library does not crash the run.

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
def load(definition):
    processor = SentencePieceProcessor(model_proto=definition)
    return lambda text: processor.decode(processor.encode(text))
""",
    "tokenizers": """
from tokenizers import Tokenizer
def load(definition):
    pipeline = Tokenizer.from_buffer(definition)
    return lambda text: pipeline.decode(pipeline.encode(text).ids)
""",
}
_RUN = """
import resource, sys
for limited, most in (resource.RLIMIT_CPU, 300), (resource.RLIMIT_AS, 8 << 30):  # even if nobody waits for it
    hard = resource.getrlimit(limited)[1]
    resource.setrlimit(limited, (most if hard < 0 else min(most, hard), hard))
texts = "a", "  The sum\\nis 1,234. ", "<s> \\u2581e\\u0301 \\u65e5\\u672c \\U0001f642\\t" + "ab" * 200, ""
try:
    use = load(sys.stdin.buffer.read())
    for text in texts:
        try:
            use(text)
        except Exception:  # a vocabulary need not have a token for everything
            pass
except BaseException as error:
    sys.exit(" ".join(str(error).split())[:500] or type(error).__name__)
"""
_PATIENCE = 300  # seconds
_passed: set[bytes] = set()


def try_in_subprocess(library: Literal["sentencepiece", "tokenizers"], definition: bytes, refusal: str) -> None:
    """Load `definition` with `library`, encode and decode a few texts; once for each definition.

    Raises TokenizerError, `refusal` followed by what came of it.
    """
    digest = hashlib.sha256(library.encode() + definition).digest()
    if digest not in _passed:
        fault = run_in_subprocess(_TRIALS[library] + _RUN, definition)
        if fault:
            raise TokenizerError(f"{refusal}, but {library} {fault}.")
        _passed.add(digest)


def run_in_subprocess(program: str, given: bytes) -> str | None:
    """Run a Python program with `given` on its standard input: None if it ends well, else what it came to."""
    command = [sys.executable, "-P", "-c", program]
    try:
        done = subprocess.run(command, input=given, capture_output=True, timeout=_PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return f"is not done with it after {_PATIENCE} s"
    except OSError as error:
        return f"cannot be tried with it: {sys.executable} does not start ({error})"
    if done.returncode < 0:
        number = -done.returncode
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        return f"was brought down by it ({name})"
    lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"status {done.returncode}"]
    return f"cannot use it ({lines[-1]})" if done.returncode else None
