"""Every family and variant as a tiny random checkpoint beside what computes it elsewhere: the table of docs/models.md.

Where transformers knows the model type, it writes the checkpoint and is the reference. Where it does not, the
checkpoint is written here by the rules of the model's own repository, and the reference is the model it unpacks to.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from tests.model.families.alibi_llama import AlibiLlama
from tests.support import SupportTable

VOCABULARY = 513  # what two ranks do not divide, and the tiny tokenizer fits into
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
"""Widths are multiples of 64 x 2, so that blocks of 64 weights commute with slicing over two ranks."""
GATED = SIZES | {"intermediate_size": 256, "initializer_range": 0.2}
GROUPED = GATED | {"num_key_value_heads": 2}
OPT = SIZES | {"ffn_dim": 256, "init_std": 0.2, "pad_token_id": 1}
GLM = GROUPED | {"head_dim": 32, "pad_token_id": 0, "eos_token_id": 1, "rms_norm_eps": 1e-5}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip

Write = Callable[[Path], object]
"""Writes a checkpoint into a directory; returns its reference: `logits` [S, V] of ids [S], `greedy` ids behind ids."""


class Case(NamedTuple):
    """A variant of a family. models: published ones of this kind. transformers: whether it knows the model type."""

    llama_type: str
    model_type: str
    models: str
    write: Write
    transformers: bool = True


class Reference:
    """A model of transformers, asked for one document at a time."""

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        self.model = model
        for key in ("eos_token_id", "bos_token_id", "forced_eos_token_id"):
            setattr(model.generation_config, key, None)  # no answer ends early
        model.generation_config.pad_token_id = 0

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """Ids [S] -> logits [S, V]."""
        return self.model(ids[None]).logits[0]

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """`count` ids behind `ids`."""
        prompt = torch.tensor([ids])
        with torch.no_grad():
            out = self.model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=count
            )
        return out[0, len(ids) :].tolist()


def random_model(config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    """Random weights in fp32; norms start as ones and biases as zeros, and are made to count."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1)
    return model


def known(model_type: str, **settings: object) -> Write:
    """A checkpoint that transformers itself writes."""

    def write(directory: Path) -> Reference:
        model = random_model(transformers.AutoConfig.for_model(model_type, **settings))
        model.save_pretrained(directory)
        return Reference(model)

    return write


def store(directory: Path, state: dict[str, Tensor], config: dict) -> None:
    """Write safetensors and config.json."""
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))


def random_llama(**settings: object) -> transformers.PreTrainedModel:
    """A LLaMA of transformers."""
    return random_model(transformers.LlamaConfig(**{**GROUPED, **settings}))


def packed_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """LLaMA's tensors as Baichuan's: q over k over v in one matrix."""
    packed = {}
    for name, tensor in state.items():
        if "q_proj" in name:
            parts = [state[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            packed[name.replace("q_proj", "W_pack")] = torch.cat(parts)
        elif "k_proj" not in name and "v_proj" not in name:
            packed[name] = tensor
    return packed


def baichuan_config(**settings: object) -> dict:
    """Its config.json in the spelling of the published ones."""
    return {
        "architectures": ["BaichuanForCausalLM"], "model_type": "baichuan", "hidden_act": "silu",
        "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "vocab_size": VOCABULARY, **settings,
    }  # fmt: skip


def baichuan_7b(directory: Path) -> Reference:
    """Rotary."""
    model = random_llama(num_key_value_heads=4)
    store(directory, packed_qkv(model.state_dict()), baichuan_config(max_position_embeddings=64))
    return Reference(model)


def baichuan_13b(directory: Path) -> AlibiLlama:
    """ALiBi, with a number of heads that is no power of two, as the 13B's 40 is none."""
    model = random_llama(hidden_size=384, num_attention_heads=12, num_key_value_heads=12, initializer_range=0.1)
    config = baichuan_config(model_max_length=64, hidden_size=384, num_attention_heads=12)
    store(directory, packed_qkv(model.state_dict()), config)
    return AlibiLlama(model.state_dict(), heads=12, eps=1e-6)


def baichuan2(directory: Path) -> Reference:
    """The 7B; its head's rows have lengths of their own in the file, and 1 where they are used: by its formula."""
    model = random_llama(num_key_value_heads=4)
    model.model.norm.weight.data *= 2  # or logits of rows so short would be small
    head = model.lm_head.weight.data
    head *= torch.linspace(0.2, 3, len(head))[:, None]
    store(directory, packed_qkv(model.state_dict()), baichuan_config(max_position_embeddings=64, z_loss_weight=0))
    model.lm_head.weight.data = (head.double() / head.double().square().sum(1, keepdim=True).sqrt()).float()
    return Reference(model)


def internlm(directory: Path) -> Reference:
    """LLaMA's names; `bias` stands for the four matrices of attention, `rotary` for the base of the rotation."""
    rope = {"rope_type": "default", "rope_theta": 1e6}
    model = random_llama(num_key_value_heads=4, attention_bias=True, rope_parameters=rope)
    config = {
        "architectures": ["InternLMForCausalLM"], "model_type": "internlm", "bias": True, "hidden_act": "silu",
        "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "vocab_size": VOCABULARY, "max_position_embeddings": 64,
        "rotary": {"base": 1000000, "type": "dynamic"},
    }  # fmt: skip
    store(directory, model.state_dict(), config)
    return Reference(model)


INTERNLM2 = {
    "model.embed_tokens": "model.tok_embeddings", "lm_head": "output", "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def renamed(name: str, names: dict[str, str]) -> str:
    """A name with what `names` lists replaced."""
    for old, new in names.items():
        name = name.replace(old, new)
    return name


def internlm2(directory: Path) -> Reference:
    """One matrix of q, k and v: for each key/value head its queries' rows, its key's and its value's."""
    model = random_llama(attention_bias=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    state, packed = model.state_dict(), {}
    for name, tensor in state.items():
        if "q_proj" in name:
            q, k, v = (state[name.replace("q_proj", f"{x}_proj")] for x in "qkv")
            heads = [part for i in range(2) for part in (q[64 * i : 64 * i + 64], k[32 * i :][:32], v[32 * i :][:32])]
            packed[name.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat(heads)
        elif "k_proj" not in name and "v_proj" not in name:
            packed[renamed(name, INTERNLM2)] = tensor
    config = {
        "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": True, "hidden_act": "silu",
        "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_scaling": None,
        "tie_word_embeddings": False, "vocab_size": VOCABULARY, "max_position_embeddings": 64,
    }  # fmt: skip
    store(directory, packed, config)
    return Reference(model)


CHATGLM = {
    "model.embed_tokens": "transformer.embedding.word_embeddings", "model.layers.": "transformer.encoder.layers.",
    "model.norm": "transformer.encoder.final_layernorm", "lm_head": "transformer.output_layer",
    "self_attn.o_proj": "self_attention.dense", "mlp.gate_up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}  # fmt: skip


def chatglm(directory: Path) -> Reference:
    """transformers' GLM under the names of ChatGLM3's own code; the base of the rotation is 5 x 10,000."""
    rope = {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.5}
    model = random_model(transformers.GlmConfig(**GLM, attention_bias=True, rope_parameters=rope))
    state, packed = model.state_dict(), {}
    for name, tensor in state.items():
        if "q_proj" in name:
            parts = [state[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            module = name.replace("self_attn.q_proj", "self_attention.query_key_value")
            packed[renamed(module, CHATGLM)] = torch.cat(parts)
        elif "k_proj" not in name and "v_proj" not in name:
            packed[renamed(name, CHATGLM)] = tensor
    packed["transformer.rotary_pos_emb.inv_freq"] = torch.ones(8)  # the published files hold such a table
    config = {
        "architectures": ["ChatGLMModel"], "model_type": "chatglm", "add_bias_linear": False, "add_qkv_bias": True,
        "apply_residual_connection_post_layernorm": False, "ffn_hidden_size": 256, "hidden_size": 128,
        "kv_channels": 32, "layernorm_epsilon": 1e-5, "multi_query_attention": True, "multi_query_group_num": 2,
        "num_attention_heads": 4, "num_layers": 2, "original_rope": True, "padded_vocab_size": VOCABULARY,
        "post_layer_norm": True, "rmsnorm": True, "rope_ratio": 5, "seq_length": 64, "tie_word_embeddings": False,
    }  # fmt: skip
    store(directory, packed, config)
    return Reference(model)


WINDOW = {"sliding_window": 6}
BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 128, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
CASES = {
    "llama": Case("llama", "llama", "LLaMA 1, Llama 2", known("llama", **GATED)),
    "llama3": Case("llama", "llama", "Llama 3, 3.1", known("llama", **GROUPED, rope_parameters=LLAMA3)),
    "smollm": Case("llama", "llama", "SmolLM, Llama 3.2", known("llama", **GROUPED, tie_word_embeddings=True)),
    "llama_biases": Case(
        "llama", "llama", "LLaMA with biases", known("llama", **GROUPED, attention_bias=True, mlp_bias=True)
    ),
    "mistral": Case("llama", "mistral", "Mistral 7B 0.1 (window)", known("mistral", **GROUPED, **WINDOW)),
    "mistral_whole": Case(
        "llama", "mistral", "Mistral 7B 0.2, 0.3", known("mistral", **GROUPED, sliding_window=None, head_dim=64)
    ),
    "qwen2": Case("llama", "qwen2", "Qwen 1.5, 2, 2.5", known("qwen2", **GROUPED, tie_word_embeddings=True)),
    "qwen2_window": Case(
        "llama",
        "qwen2",
        "Qwen 2 (window in the upper layers)",
        known("qwen2", **GROUPED, **WINDOW, use_sliding_window=True, max_window_layers=1),
    ),
    "qwen3": Case("llama", "qwen3", "Qwen 3", known("qwen3", **GROUPED, head_dim=64)),
    "baichuan_7b": Case("llama", "baichuan", "Baichuan 7B", baichuan_7b, transformers=False),
    "baichuan_13b": Case("llama", "baichuan", "Baichuan 13B (ALiBi)", baichuan_13b, transformers=False),
    "baichuan2": Case("llama", "baichuan", "Baichuan 2 (normalized head)", baichuan2, transformers=False),
    "internlm": Case("llama", "internlm", "InternLM 7B, 20B", internlm, transformers=False),
    "internlm2": Case("llama", "internlm2", "InternLM 2, 2.5", internlm2, transformers=False),
    "internlm3": Case("llama", "internlm3", "InternLM 3", known("internlm3", **GROUPED, head_dim=32)),
    "opt": Case("opt", "opt", "OPT", known("opt", **OPT, word_embed_proj_dim=128)),
    "opt_350m": Case(
        "opt",
        "opt",
        "OPT 350M (norms after)",
        known("opt", **{**OPT, "init_std": 0.25}, word_embed_proj_dim=64, do_layer_norm_before=False),
    ),
    "bloom": Case("bloom", "bloom", "BLOOM, BLOOMZ", known("bloom", **BLOOM)),
    "neox": Case("neox", "gpt_neox", "GPT-NeoX, Pythia", known("gpt_neox", **GATED)),
    "neox_sequential": Case(
        "neox", "gpt_neox", "GPT-NeoX (sequential)", known("gpt_neox", **GATED, use_parallel_residual=False)
    ),
    "glm": Case("glm", "glm", "GLM-4 9B", known("glm", **GLM, attention_bias=True)),
    "glm4": Case("glm", "glm4", "GLM-4 0414", known("glm4", **GLM, attention_bias=True)),
    "chatglm": Case("glm", "chatglm", "ChatGLM2, ChatGLM3", chatglm, transformers=False),
}
"""Name of a variant -> its case; each is a row of docs/models.md, and a run of test_families.py."""


def _row(case: Case) -> tuple[str, ...]:
    """What a row of the table begins with."""
    against = "transformers" if case.transformers else "the same, unpacked"
    if case.write in (baichuan_13b, baichuan2):
        against = "its formula"
    return case.models, f"`{case.llama_type}`", f"`{case.model_type}`", against


FAMILIES_TABLE = SupportTable(
    "models.md",
    "families",
    ("models", "`--llama_type`", "`model_type`", "compared with"),
    {name: _row(case) for name, case in CASES.items()},
    ("logits", "greedy answers", "NF4 + NormBiasLoRA", "NF4 + QST", "2-way tensor parallel"),
)
