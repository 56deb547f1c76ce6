"""What convert and merge write as GGUF, in llama.cpp: its greedy tokens and its ids of 300 texts."""

from __future__ import annotations

import io
import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, models, processors, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, LlamaTokenizer

from accessory.generate import generate_tokens
from accessory.meta import MetaModel
from accessory.tokenizer import open_tokenizer
from accessory.tokenizer.pre_tokenization import PRE_TOKENIZATIONS
from tests.checkpoint.trained import write_trained
from tests.model.families.matrix import CASES
from tests.texts import mixed_texts

TOKENS = 508  # as many as the models' 513 rows have room for, with some to spare
LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
MODELS = {
    "llama": ("llama", "tokenizer.model", 12),
    "llama, tokenizer.json": ("smollm", "byte fallback", 12),
    "llama 3": ("llama3", "llama-bpe", 12),
    "mistral": ("mistral_whole", "byte fallback", 12),
    "mistral with its window": ("mistral", "byte fallback", 3),  # prompt and answer fill the window
    "qwen2": ("qwen2", "qwen2", 12),
    "qwen3": ("qwen3", "qwen2", 12),
    "bloom": ("bloom", "bloom", 12),
    "neox": ("neox", "olmo", 12),
    "glm4": ("glm4", "glm4", 12),
}
"""A model -> its case, its vocabulary, and the tokens to compare behind a prompt of three."""
PROMPTS = ([5, 96, 33], [88, 3, 50])
TEXTS = mixed_texts(300)


def write_sentencepiece(directory: Path, kind: str) -> None:
    """A sentencepiece model as LLaMA's own, alone or beside the tokenizer.json of Llama 2 that is made of it."""
    model = io.BytesIO()
    texts = iter(text for text in mixed_texts(2000, seed=1) if "\n" not in text)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_writer=model, model_type="bpe", vocab_size=TOKENS, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    if kind == "byte fallback":
        LlamaTokenizer.from_pretrained(directory).save_pretrained(directory / "made")
        made = json.loads((directory / "made" / "tokenizer.json").read_text(encoding="utf-8"))
        blanks = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
        made |= {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": blanks}}
        (directory / "tokenizer.json").write_text(json.dumps(made), encoding="utf-8")
        shutil.rmtree(directory / "made")
    config = LLAMA_TOKENS | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def write_byte_level(directory: Path, pre: str) -> None:
    """A byte-level BPE that cuts text as `pre` does."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    special = ["<|endoftext|>", "[gMASK]", "<sop>"]
    alphabet = sorted(ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    learner.train_from_iterator(mixed_texts(2000, seed=1), trainer)
    learned = json.loads(learner.to_str())["model"]
    pipeline = PRE_TOKENIZATIONS[pre].pipeline(learned["vocab"], [tuple(merge) for merge in learned["merges"]])
    pipeline.add_special_tokens(special)
    pipeline.decoder = decoders.ByteLevel()
    if PRE_TOKENIZATIONS[pre].start_tokens:
        ids = [(name, learned["vocab"][name]) for name in PRE_TOKENIZATIONS[pre].start_tokens]
        pipeline.post_processor = processors.TemplateProcessing("[gMASK] <sop> $A", None, ids)
    pipeline.save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def expected_ids(directory: Path, kind: str) -> list[list[int]]:
    """Of `TEXTS`, by the library that the vocabulary is from."""
    if kind == "tokenizer.model":
        return sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model")).encode(TEXTS)
    return AutoTokenizer.from_pretrained(directory)(TEXTS, add_special_tokens=False).input_ids


def greedy(directory: Path, steps: int) -> list[list[int]]:
    """Ours behind each prompt, in fp32, whatever ends an answer."""
    model = MetaModel.from_pretrained(directory, dtype="fp32")
    made = generate_tokens(model.llma, list(map(list, PROMPTS)), max_gen_len=steps, max_seq_len=64, stop_ids=set())
    return torch.tensor(list(made)).T.tolist()


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_answers_as_the_model_does(llama_cpp, called: Callable, tmp_path: Path, name: str) -> None:
    """The converted base as transformers and we do, the merged part as the part does; texts become the same ids."""
    case, kind, steps = MODELS[name]
    base, part = tmp_path / "base", tmp_path / "part"
    base.mkdir()
    reference = CASES[case].write(base)
    write_byte_level(base, kind) if kind in PRE_TOKENIZATIONS else write_sentencepiece(base, kind)
    done = called("tools/convert.py", base, tmp_path / "base.gguf", "--to", "gguf", "--gguf_type", "f32")
    assert done.returncode == 0, done.stderr
    assert ("the model's sliding window" in done.stdout) == (name == "mistral with its window")
    composes = kind in PRE_TOKENIZATIONS and PRE_TOKENIZATIONS[kind].composes
    assert ("does not compose" in done.stdout) == composes
    texts = [unicodedata.normalize("NFC", text) for text in TEXTS] if composes else TEXTS
    asked = {"texts": texts, "prompts": PROMPTS, "steps": steps}
    found = llama_cpp.ask(tmp_path / "base.gguf", **asked)
    answers = [answer["ids"] for answer in found["answers"]]
    assert answers == [reference.greedy(prompt, steps) for prompt in PROMPTS] == greedy(base, steps)
    assert found["texts"] == expected_ids(base, kind)

    write_trained(base, part, bias_tuning=False)
    tokenizer = open_tokenizer(base).with_added_tokens(["<|new|>"])
    tokenizer.save(part)
    arguments = ("--to", "gguf", "--gguf_type", "f32", "--probe", "What is this?")
    done = called("tools/merge.py", part, tmp_path / "part.gguf", *arguments)
    assert done.returncode == 0, done.stderr
    found = llama_cpp.ask(tmp_path / "part.gguf", **asked, marked=["<|new|>"], ids=tokenizer.stop_ids)
    merged = [answer["ids"] for answer in found["answers"]]
    assert merged == greedy(part, steps) != answers
    assert found["texts"] == expected_ids(base, kind)
    assert found["marked"] == [[tokenizer.vocab_size - 1]]
    assert set(found["ends"]) == tokenizer.stop_ids
