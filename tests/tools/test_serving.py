"""An OpenAI-compatible server, llama.cpp's own, answers from what convert and merge wrote as the model does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from accessory.generate import generate_tokens
from accessory.meta import MetaModel
from accessory.parallel import groups
from tests.checkpoint.trained import write_trained
from tests.model.families.matrix import CASES
from tests.tools.test_gguf_for_llama_cpp import write_byte_level

TEMPLATE = (
    "{% for m in messages %}<sop>{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}<|endoftext|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<sop>assistant: {% endif %}"
)
SERVER = """
import sys
import xllamacpp

settings = xllamacpp.CommonParams()
settings.model.path, settings.n_ctx, settings.n_parallel, settings.port = sys.argv[1], 64, 1, 0
settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(settings)
print(server.listening_address, flush=True)
sys.stdin.read()
"""
"""llama-server in a Python package: it listens until its standard input is closed."""
FIRST = [{"role": "system", "content": "Be"}, {"role": "user", "content": "Why"}]
TOKENS = 8  # behind 2 turns, 64 in all: as many as the models have positions for


@contextmanager
def served(file: Path, environment: dict[str, str]) -> Iterator[str]:
    """The address of a server that has loaded a GGUF file."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(file)], env=environment, text=True, **pipes)
    try:
        yield server.stdout.readline().strip()
    finally:
        server.communicate(timeout=30)


def completed(address: str, messages: list[dict[str, str]]) -> dict:
    """What the server answers greedily, with its tokens."""
    asked = {"messages": messages, "temperature": 0, "max_tokens": TOKENS, "logprobs": True, "cache_prompt": True}
    answer = httpx.post(f"{address}/v1/chat/completions", json=asked, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def whole_characters(model: MetaModel, ids: list[int]) -> list[int]:
    """Tokens that are no part of a character: the server does not tell of others."""
    return [token for token in ids if "\ufffd" not in model.tokenizer.decode([token])]


def test_chat_completions_are_the_models_own(called: Callable, tmp_path: Path, clean_environment) -> None:
    """Two turns each: the same prompt by the checkpoint's template, the same tokens; the part answers otherwise."""
    pytest.importorskip("xllamacpp")
    base, part = tmp_path / "base", tmp_path / "part"
    base.mkdir()
    CASES["llama3"].write(base)
    write_byte_level(base, "llama-bpe")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    write_trained(base, part, bias_tuning=False)
    groups.start("cpu")
    answers = []
    for tool, source, *flags in (("convert", base), ("merge", part, "--probe", "x")):
        file = tmp_path / f"{tool}.gguf"
        done = called(f"tools/{tool}.py", source, file, "--to", "gguf", "--gguf_type", "f32", *flags)
        assert done.returncode == 0, done.stderr
        model = MetaModel.from_pretrained(source, dtype="fp32", max_seq_len=64)
        with served(file, clean_environment) as address:
            messages = FIRST
            for _ in range(2):
                found, prompt = completed(address, messages), model.prompt_tokens(messages)
                steps = generate_tokens(
                    model.llma, [prompt], max_gen_len=TOKENS, max_seq_len=64, stop_ids=model.chat.stop_ids
                )
                expected = [token for (token,) in steps]
                assert found["usage"]["prompt_tokens"] == len(prompt)
                said = [token["id"] for token in found["choices"][0]["logprobs"]["content"]]
                assert whole_characters(model, said) == whole_characters(model, expected) != []
                answers.append(expected)
                messages = [*messages, {"role": "assistant", "content": "So"}, FIRST[-1]]
    assert answers[0] != answers[2]
