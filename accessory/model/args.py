"""The settings of a decoder, whatever file they were read from."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from accessory.errors import ParallelError

# Larger than any real model: a file that states more is refused before anything of that size is made.
Size = Annotated[int, Field(ge=1, le=1 << 24)]
MOST_BLOCKS = 1 << 12
Count = Annotated[int, Field(ge=1, le=MOST_BLOCKS)]
ALIBI_REACH = 1 << 16
"""Positions that ALiBi's channels distinguish in every dtype: two parts of 8 bits, as many as bf16 holds."""


class RopeScaling(BaseModel):
    """How rotary frequencies are stretched beyond the trained context. `dynamic` changes nothing within it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    kind: Literal["linear", "llama3", "dynamic"]
    factor: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    low_freq_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    high_freq_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 4.0
    original_max_position_embeddings: Annotated[int, Field(ge=1, le=1 << 30)] = 8192

    @model_validator(mode="after")
    def _bands_in_order(self) -> RopeScaling:
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor} is not above low_freq_factor {self.low_freq_factor}"
            )
        return self


class ModelArgs(BaseModel):
    """Decoder settings. The names of `params.json` (Meta) and of LLaMA2-Accessory, plus what other checkpoints need."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    architecture: str = "llama"
    """What the model is called elsewhere (Hugging Face's `model_type`); decides how other files name its weights."""
    dim: Size = 4096
    """Model width D."""
    n_layers: Count = 32
    """Number of blocks."""
    n_heads: Count = 32
    """Attention heads H."""
    n_kv_heads: Count | None = None
    """Key/value heads K; equal to n_heads when absent."""
    head_dim: Size | None = None
    """Head width E; dim / n_heads when absent."""
    vocab_size: Annotated[int, Field(ge=-1, le=1 << 24)] = -1
    """Rows of the embedding and the head; -1 takes the checkpoint's."""
    embedding_dim: Size | None = None
    """Width of the embedding and the head where it is not dim; a projection leads in and another out (OPT-350m)."""
    hidden_dim: Size | None = None
    """MLP width F; when absent it follows from dim, ffn_dim_multiplier and multiple_of as in Meta's code."""
    multiple_of: Size = 256
    """The MLP width is rounded up to a multiple of this."""
    ffn_dim_multiplier: float | None = None
    """Factor on the MLP width before rounding."""
    gated: bool = True
    """Whether the MLP is w2(act(w1 x) * w3 x); otherwise it is w2(act(w1 x)), without a w3."""
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    """Activation function act of the MLP."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm, or LayerNorm with a bias."""
    norm_eps: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-5
    """Epsilon of the norms."""
    norm_placement: Literal["before", "after", "both"] = "before"
    """Norms before attention and MLP, after their residual sums (OPT-350m), or before and on their outputs (GLM-4)."""
    final_norm: bool = True
    """Whether a norm follows the last block."""
    embedding_norm: bool = False
    """Whether a norm follows the embedding (BLOOM)."""
    qk_norm: bool = False
    """Whether RMSNorm is applied to each head's query and key before they are rotated (Qwen3)."""
    parallel_residual: bool = False
    """Whether attention and MLP read the same input and are added together (GPT-NeoX)."""
    position: Literal["rotary", "learned", "alibi"] = "rotary"
    """How positions enter: rotated queries and keys, a learned embedding, or attention biased by distance."""
    position_offset: Annotated[int, Field(ge=0, le=1 << 12)] = 0
    """Row of the learned position embedding that belongs to position 0 (OPT: 2)."""
    rotary_layout: Literal["pairs", "halves"] = "pairs"
    """Channels of a head that rotate together: neighbours (Meta, GLM), or i and i + rotary_dim / 2 (Hugging Face)."""
    rotary_dim: Size | None = None
    """Channels of a head that are rotated, the first ones; head_dim when absent."""
    sliding_window: Size | None = None
    """Tokens that a token attends to, itself included; all before it when absent."""
    sliding_layers: list[int] | None = None
    """Blocks that the window applies to; all when absent."""
    rope_theta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Context extension; a bare number x, as in LLaMA2-Accessory, multiplies positions by x."""
    use_scaled_rope: bool = False
    """Meta's Llama 3.1 switch: llama3 scaling with its published constants."""
    qkv_bias: bool = False
    """Whether the checkpoint has biases on wq, wk, wv."""
    out_bias: bool = False
    """Whether the checkpoint has a bias on wo."""
    mlp_bias: bool = False
    """Whether the checkpoint has biases on w1, w2, w3."""
    tie_word_embeddings: bool = False
    """Whether the head is the embedding."""
    max_seq_len: Annotated[int, Field(ge=1, le=1 << 30)] = 2048
    """Longest document the model was made for, in tokens; a bound for learned positions and dynamic scaling."""
    max_batch_size: int = 32
    """Accepted because upstream's files hold it; the key/value cache is sized by the batch at hand."""

    @field_validator("rope_scaling", mode="before")
    @classmethod
    def _read_scaling(cls, value: Any) -> Any:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if not value > 0:
                raise ValueError("expected a number above 0, what positions are multiplied by")
            return {"kind": "linear", "factor": 1.0 / value}
        if isinstance(value, dict):
            kind = value.get("kind", value.get("rope_type", value.get("type")))
            return None if kind == "default" else {**value, "kind": kind}
        return value

    def model_post_init(self, _context: Any) -> None:
        """Fill in the settings that follow from others."""
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        self.head_dim = self.head_dim or self.dim // self.n_heads
        self.rotary_dim = self.rotary_dim or self.head_dim
        self.embedding_dim = self.embedding_dim or self.dim
        if self.hidden_dim is None:
            width = int(2 * (4 * self.dim) / 3)
            if self.ffn_dim_multiplier is not None:
                width = int(self.ffn_dim_multiplier * width)
            self.hidden_dim = -(-width // self.multiple_of) * self.multiple_of
        if self.use_scaled_rope and self.rope_scaling is None:
            self.rope_scaling = RopeScaling(kind="llama3", factor=8.0)

    @model_validator(mode="after")
    def _fits_together(self) -> ModelArgs:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{self.n_heads} attention heads cannot share {self.n_kv_heads} key/value heads")
        if self.position == "rotary" and (self.rotary_dim > self.head_dim or self.rotary_dim % 2):
            raise ValueError(f"{self.rotary_dim} of {self.head_dim} channels of a head cannot be rotated in pairs")
        return self

    @property
    def longest_document(self) -> int | None:
        """Tokens of the longest document that the model's positions allow; None if there is no limit."""
        if self.position == "alibi":
            return ALIBI_REACH
        dynamic = self.rope_scaling is not None and self.rope_scaling.kind == "dynamic"
        bounded = self.position == "learned" or (self.position == "rotary" and dynamic)
        return self.max_seq_len if bounded else None

    @property
    def stated_length(self) -> int | None:
        """Tokens of the longest document the model was made for, as its files state it; None where they do not."""
        return self.max_seq_len if "max_seq_len" in self.model_fields_set else None

    def window(self, layer: int) -> int | None:
        """Tokens that block `layer` attends to; None for all."""
        return self.sliding_window if self.sliding_layers is None or layer in self.sliding_layers else None

    def check_model_parallel(self, size: int) -> None:
        """Raise `ParallelError` if `size` ranks cannot share this model evenly, naming the sizes that can."""
        counts = {
            "attention heads": self.n_heads,
            "key/value heads": self.n_kv_heads,
            "MLP width pairs": self.hidden_dim // 2,
        }
        bad = [f"{count} {what}" for what, count in counts.items() if count % size]
        if bad:
            good = [n for n in range(1, self.n_heads + 1) if not any(count % n for count in counts.values())]
            raise ParallelError(
                f"--model_parallel_size {size} does not divide this model's {', '.join(bad)}; "
                f"sizes that do: {', '.join(map(str, good))}. "
                "Demos and MultiGpuWrapper cut it over all their processes."
            )
