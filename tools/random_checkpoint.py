"""A Hugging Face checkpoint of random weights, to measure and try things with:

python tools/random_checkpoint.py TARGET --shape tinyllama --dtype fp16     or:  --shape CONFIG.json
"""

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

from accessory.blueprint import DTYPES
from accessory.checkpoint.lazy import zeros
from accessory.checkpoint.load import named_generator, targets
from accessory.checkpoint.naming import theirs_from_ours
from accessory.checkpoint.save import fresh_directory
from accessory.checkpoint.source import read_json, settings_read_by
from accessory.checkpoint.whole import refuse_existing
from accessory.entry import from_command_line, run_tool
from accessory.errors import ConfigError, nearest
from accessory.model.decoder import Decoder
from accessory.model.families import architecture_of

SHAPES = {
    "tinyllama": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
    },
}
"""Settings by name; TinyLlama (Zhang et al. 2024) has 1.1 billion parameters."""


def main(target: str, shape: str = "tinyllama", dtype: str = "fp16", seed: int = 0) -> None:
    """Write random weights into the new directory TARGET.

    Args:
        target: a new directory.
        shape: tinyllama, or a config.json of any model type we know.
        dtype: bf16, fp16 or fp32.
        seed: the same seed gives the same weights.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    if type(seed) is not int:
        raise ConfigError(f"--seed {seed!r}: expected a whole number.")
    if str(shape) not in SHAPES and not Path(str(shape)).exists():
        raise ConfigError(f"--shape {shape!r} is neither {', '.join(SHAPES)} nor a file.{nearest(str(shape), SHAPES)}")
    config = SHAPES.get(str(shape)) or read_json(Path(str(shape)))
    architecture = architecture_of(config.get("model_type"), str(shape))
    args = settings_read_by(lambda: architecture.read(config, str(shape)), Path(str(shape)))
    decoder = Decoder(args, dtype=DTYPES[dtype])
    empty = {place.name: zeros(*place.whole_shape(1)) for place in targets(decoder)}
    theirs = theirs_from_ours(empty, architecture.names, args)
    refuse_existing(Path(str(target)))
    with fresh_directory(Path(str(target))) as directory:
        tensors = {}
        for name, tensor in tqdm(theirs.items(), desc="making", unit="tensor", disable=None):
            values = torch.randn(tensor.shape, generator=named_generator(seed, name), dtype=torch.float32)
            tensors[name] = (values.mul_(0.02) if values.dim() == 2 else values.mul_(0.1).add_(1)).to(DTYPES[dtype])
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        named = {"architectures": [architecture.class_name], "torch_dtype": str(DTYPES[dtype]).removeprefix("torch.")}
        (directory / "config.json").write_text(json.dumps({**config, **named, "eos_token_id": 0, "pad_token_id": 0}))
        _write_byte_tokenizer(directory, args.vocab_size)
    print(f"{target}: {sum(t.numel() for t in tensors.values()):,} random parameters in {dtype}")


def _write_byte_tokenizer(directory: Path, size: int) -> None:
    """A vocabulary of the 256 bytes and as many names nobody uses as the embedding has further rows."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["</s>", *alphabet, *(f"<unused{i}>" for i in range(size - 1 - len(alphabet)))][:size]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"eos_token": "</s>", "bos_token": null}')


if __name__ == "__main__":
    run_tool(from_command_line(main))
