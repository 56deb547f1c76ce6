"""GGUF files of a vocabulary alone, written by the `gguf` package."""

import json

import gguf

from accessory.tokenizer.gguf_fields import add_fields, vocabulary_fields

NORMAL, CONTROL = 1, 3


def write(path, kind, tokens, types, *, merges=(), scores=(), pre=None, **settings):
    """Write a vocabulary of `kind`, llama or gpt2; settings by the names of the writer's methods, without add_."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if merges:
        writer.add_token_merges(list(merges))
    if scores:
        writer.add_token_scores(list(scores))
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    for name, value in settings.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def write_fields(path, tokenizer, rows):
    """Write the vocabulary of one of our tokenizers, for `rows` rows of an embedding."""
    writer = gguf.GGUFWriter(path, "llama")
    add_fields(writer, vocabulary_fields(tokenizer, rows))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def write_byte_level(path, pipeline, pre, **settings):
    """Write the BPE of a pipeline of `tokenizers`."""
    model = json.loads(pipeline.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    types = [CONTROL if token.startswith("<|") else NORMAL for token in tokens]
    merges = [" ".join(merge) for merge in model["merges"]]
    settings = {"bos_token_id": 1, "eos_token_id": 2, **settings}
    return write(path, "gpt2", tokens, types, merges=merges, pre=pre, **settings)
