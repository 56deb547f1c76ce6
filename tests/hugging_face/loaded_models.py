"""Models as users load them by transformers, and batches as it has them."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import Tensor

from accessory.hugging_face import QSTForCausalLM, QSTLlamaForCausalLM, QSTOPTForCausalLM

SIDE = {"label_share": 1, "r": 4, "peft_hidden_size": 8}
CLASSES = {"llama": QSTLlamaForCausalLM, "opt": QSTOPTForCausalLM}
TOKENS = torch.arange(40) * 7 % 500


def loaded(path: Path, bits: bool = True, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """As users load a base: NF4 with double quantization on the CPU, or plain."""
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
    )  # fmt: skip
    how = {"quantization_config": settings} if bits else {}
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map={"": "cpu"}, **how)


def moved(model: QSTForCausalLM) -> QSTForCausalLM:
    """With a side network at random, so that it adds something."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model


def batch(rows: list[tuple[Tensor, Tensor]], side: str = "right") -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and labels [B, S] of (tokens, labels), which are those of the tokens themselves."""
    longest = max(len(tokens) for tokens, _ in rows)

    def padded(values: Tensor, with_: int) -> Tensor:
        rest = values.new_full((longest - len(values),), with_)
        return torch.cat([rest, values] if side == "left" else [values, rest])

    return (
        torch.stack([padded(tokens, 1) for tokens, _ in rows]),
        torch.stack([padded(torch.ones_like(tokens), 0) for tokens, _ in rows]),
        torch.stack([padded(labels, -100) for _, labels in rows]),
    )
