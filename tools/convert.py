"""Read any checkpoint into Accessory's layout:  python tools/convert.py SOURCE TARGET [--dtype bf16|fp16|fp32]"""

import sys
from pathlib import Path

import fire
import torch

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from accessory.blueprint import DTYPES, draw_blueprint
from accessory.checkpoint.convert import write_base
from accessory.checkpoint.load import resolve
from accessory.checkpoint.source import open_source
from accessory.errors import AccessoryError, ConfigError
from accessory.parallel.groups import Layout


def convert(source: str, target: str, dtype: str = "bf16", llama_config: str = "", tokenizer_path: str = "") -> None:
    """Write the checkpoint SOURCE as a new Accessory directory TARGET (Meta's row order, one dtype, tokenizer too)."""
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    opened = open_source(str(source))
    blueprint = draw_blueprint(
        [opened],
        llama_type="llama",
        llama_config=[Path(llama_config)] if llama_config else [],
        tokenizer_path=Path(tokenizer_path) if tokenizer_path else None,
        quant_type=None,
        precision=dtype,
        train=False,
    )
    decoder, attachment = blueprint.build(Layout())
    resolve(decoder, [opened], attachment, initialize=False)  # refuses what is not a whole model
    write_base(opened, blueprint.args.model_dump(), blueprint.tokenizer, Path(str(target)), DTYPES[dtype])
    print(
        f"{opened.format} {source} -> {target} ({torch.finfo(DTYPES[dtype]).bits} bits, {len(opened.tensors)} tensors)"
    )


if __name__ == "__main__":
    try:
        fire.Fire(convert)
    except AccessoryError as error:
        sys.exit(f"{type(error).__name__}: {error}")
