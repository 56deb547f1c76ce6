"""Side networks as the published QST code saves them, and the bases they are beside."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm
from transformers.models.opt.modeling_opt import OPTDecoderLayer

from accessory.meta import MetaModel
from tests.conftest import copy_tokenizer

VOCABULARY, WIDTH, R, BOTTLENECK = 512, 64, 4, 6
COMMON = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4,
          "max_position_embeddings": 64}  # fmt: skip
CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(
        **COMMON, intermediate_size=98, num_key_value_heads=2, initializer_range=0.15
    ),
    "opt": lambda: transformers.OPTConfig(**COMMON, ffn_dim=130, word_embed_proj_dim=WIDTH, init_std=0.15),
}
"""The MLPs' widths are no multiples of R: both widths are rounded down."""
FILES = {"layers": "qst_layers_parameters.pt", "z": "qst_z_parameters.pt", "downsample": "qst_downsample_parameters.pt",
         "norm": "qst_norm_parameters.pt", "upsample": "qst_upsample_parameters.pt"}  # fmt: skip
FINAL_GATE = {"llama": "lm_head_z_path.pt", "opt": "lm_head_z_parameters.pt"}
TOKENS = torch.randint(2, VOCABULARY, (20,), generator=torch.Generator().manual_seed(1))


class Adapter(nn.Module):
    """The modules of the published adapter, by their names."""

    def __init__(self, wide: int, narrow: int, before: bool = False) -> None:
        super().__init__()
        self.adapter_A = nn.Linear(wide, BOTTLENECK, bias=False)
        self.adapter_B = nn.Linear(BOTTLENECK, narrow, bias=False)
        if before:
            self.pre_layer_norm = nn.LayerNorm(wide)
        self.post_layer_norm = nn.LayerNorm(narrow)


class Published(nn.Module):
    """The trained modules of the published model, by their names; random, its final gate left out."""

    def __init__(self, config: transformers.PretrainedConfig, before: bool = False) -> None:
        super().__init__()
        narrow, llama = copy.deepcopy(config), config.model_type == "llama"
        narrow.hidden_size, mlp = config.hidden_size // R, "intermediate_size" if llama else "ffn_dim"
        narrow.head_dim = narrow.hidden_size // config.num_attention_heads  # not a setting of its transformers
        setattr(narrow, mlp, getattr(config, mlp) // R)
        width, count = narrow.hidden_size, config.num_hidden_layers
        self.qst_layers = nn.ModuleList(
            LlamaDecoderLayer(narrow, i) if llama else OPTDecoderLayer(narrow) for i in range(count)
        )
        self.z = nn.ParameterList(nn.Parameter(torch.full((width,), 0.5)) for _ in range(count))
        self.downsample = nn.ModuleList(Adapter(config.hidden_size, width, before) for _ in range(count))
        self.norm = LlamaRMSNorm(width) if llama else nn.LayerNorm(width)
        self.upsample = nn.Linear(width, config.hidden_size)
        generator = torch.Generator().manual_seed(3)
        for parameter in self.parameters():
            spread = torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data * (parameter.dim() < 2) + 0.3 * spread

    def save(self, directory: Path, final_gate: Tensor | None, family: str) -> Path:
        """As `save_qst_state`."""
        directory.mkdir()
        modules = {"layers": self.qst_layers, "z": self.z, "downsample": self.downsample, "norm": self.norm,
                   "upsample": self.upsample}  # fmt: skip
        for name, module in modules.items():
            torch.save(module.state_dict(), directory / FILES[name])
        if final_gate is not None:
            torch.save(final_gate, directory / FINAL_GATE[family])
        return directory


def write_base(family: str, directory: Path, tokenizer: Path) -> Path:
    """A Hugging Face directory of the family, with the tokenizer of another."""
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(CONFIGS[family]()).float().save_pretrained(directory)
    copy_tokenizer(tokenizer, directory)
    return directory


def family_of(base: Path) -> str:
    """What its config says."""
    return transformers.AutoConfig.from_pretrained(base).model_type


def published(base: Path, directory: Path, final_gate: Tensor | None = None, before: bool = False) -> Path:
    """A side network for `base` as the published code saves it."""
    family = family_of(base)
    return Published(CONFIGS[family](), before).save(directory, final_gate, family)


def ours(*paths: Path) -> Tensor:
    """Logits of the tokens here, [T, V]."""
    return MetaModel.from_pretrained(list(paths), dtype="fp32").logits(TOKENS, (len(TOKENS),))


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())
