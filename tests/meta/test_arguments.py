"""Arguments of `MetaModel.from_pretrained`: their forms, and what is said of those that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from accessory.errors import AccessoryError, ConfigError
from accessory.meta import MetaModel


def test_a_storage_format_alone_packs_the_base(checkpoint, tmp_path: Path) -> None:
    """quant_type without quant is not ignored."""
    checkpoint()
    model = MetaModel.from_pretrained(tmp_path, quant_type="int8")
    assert model.llma.layers[0].attention.wq.weight.name == "int8"


@pytest.mark.parametrize(("dtype", "width"), [
    (torch.bfloat16, torch.bfloat16), ("bfloat16", torch.bfloat16), ("torch.float32", torch.float32),
    (torch.float16, torch.float16), ("fp16", torch.float16),
])  # fmt: skip
def test_dtype_by_any_of_its_names(checkpoint, tmp_path: Path, dtype: str | torch.dtype, width: torch.dtype) -> None:
    checkpoint()
    assert MetaModel.from_pretrained(tmp_path, dtype=dtype).llma.layers[0].attention.wq.weight.dtype == width


def test_settings_and_tokenizer_by_name(checkpoint, tmp_path: Path) -> None:
    """One path where several may stand, and texts for paths."""
    checkpoint()
    settings = tmp_path / "more.json"
    settings.write_text('{"rope_theta": 5000.0}')
    names = {"llama_config": str(settings), "tokenizer_path": str(tmp_path)}
    model = MetaModel.from_pretrained(
        str(tmp_path), **names, with_visual=False, mp_group=None
    )  # as upstream's users do
    assert model.llma.args.rope_theta == 5000.0
    assert MetaModel.from_pretrained((tmp_path,), llama_config=[str(settings)]).llma.args.rope_theta == 5000.0


@pytest.mark.parametrize(("wrong", "said"), [
    ({"dtype": torch.int8}, r"dtype torch.int8 is unknown. Known: bf16, fp16"),
    ({"dtype": "bf61"}, r"dtype 'bf61' is unknown. Did you mean 'bf16'\?"),
    ({"quant": "int8"}, "quant is 'int8'; expected True, False or None: the format is named by quant_type"),
    ({"device": "gpu"}, "--device 'gpu' is not one of auto, cpu, cuda"),
    ({"llama_config": "absent.json"}, "absent.json: cannot be read"),
    ({"llama_config": {"dimm": 3}}, r"llama_config: unknown key 'dimm'. Did you mean 'dim'\?"),
    ({"llama_config": 3}, "llama_config is 3; expected a file, settings, or a list of some"),
    ({"llama_config": [3]}, "a path is 3; expected a text or a Path, or a list of some"),
    ({"llama_type": 5, "max_seq_len": 0}, "(?s)'llama_type' is 5: .*'max_seq_len' is 0: Input should be greater than"),
    ({"quant_type": 4}, "MetaModel: 'quant_type' is 4: Input should be a valid string"),
    ({"tokenizer_path": 5}, "'tokenizer_path' is 5: Input is not a valid path"),
    ({"mp_group": 1}, "'mp_group': layout=groups.start"),
    ({"torch_dtype": "bf16", "load_in_4bit": True},
     r"(?s)'torch_dtype': dtype takes.*'load_in_4bit': quant keeps .* of quant_type"),
    ({"divice": "cpu"}, r"from_pretrained: unknown argument 'divice'. Did you mean 'device'"),
])  # fmt: skip
def test_wrong_arguments(checkpoint, tmp_path: Path, wrong: dict, said: str) -> None:
    checkpoint()
    with pytest.raises(AccessoryError, match=said):
        MetaModel.from_pretrained(tmp_path, **wrong)
    for nothing in ("", [], None):
        with pytest.raises(ConfigError, match=r"pretrained_path is .*; expected a checkpoint|a path is None; expected"):
            MetaModel.from_pretrained(nothing)
