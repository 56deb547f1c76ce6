"""A `MetaModel` as a model of transformers: for its Trainer and its `generate`, with everything that these can do."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from accessory.checkpoint.save import fresh, write_json
from accessory.errors import ConfigError, DataError
from accessory.generate import next_token_logits, read_prompts
from accessory.hugging_face.forward import CausalForward, CausalOutput, check_ids, keep_only
from accessory.hugging_face.padding import PaddedRows
from accessory.meta import MetaModel
from accessory.model.decoder import Decoder
from accessory.model.decoding import decoding

_GROWTH = 256  # tokens by which a cache grows, at least


class AccessoryConfig(PreTrainedConfig):
    """What transformers asks of a model's settings; ours are in `AccessoryForCausalLM.model.llma.args`."""

    model_type: ClassVar[str] = "accessory"


class RowsCache:
    """Keys and values of B rows, padded on the left to as many columns as `get_seq_length` says."""

    def __init__(self, decoder: Decoder, rows: int, longest: int) -> None:
        self.decoder, self.columns = decoder, 0
        self.layers = decoder.new_cache(rows, longest + _GROWTH)

    def get_seq_length(self, layer: int = 0) -> int:
        """Columns of which the keys and values are known, padding included."""
        return self.columns

    def make_room(self, longest: int) -> None:
        """For rows of so many tokens."""
        room = self.layers[0].keys.shape[1]
        if longest > room:
            for layer in self.layers:
                layer.grow(longest + _GROWTH, room)

    def reorder_cache(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was, as beam search asks."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]


class AccessoryForCausalLM(CausalForward, PreTrainedModel, GenerationMixin):
    """A base with what is trained in it or beside it, in any storage and method, as transformers knows its models.

    `from_pretrained` loads it as `MetaModel.from_pretrained` does; `model` is that. Forward takes padded rows and gives
    loss and logits; `generate` is transformers' own, with the decoder's key/value cache. State dict and
    `save_pretrained` hold what is trained.
    """

    config_class = AccessoryConfig
    main_input_name = "input_ids"

    def __init__(self, model: MetaModel) -> None:
        """model: what `MetaModel.from_pretrained` gives; with `train=True` it can be trained."""
        args, tokenizer = model.llma.args, model.tokenizer
        ends = sorted(tokenizer.stop_ids)
        special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends, "pad_token_id": tokenizer.eos_id}
        super().__init__(
            AccessoryConfig(
                vocab_size=args.vocab_size,
                hidden_size=args.dim,
                num_hidden_layers=args.n_layers,
                num_attention_heads=args.n_heads,
                max_position_embeddings=args.stated_length,
                **special,
            )
        )
        self.model = model
        self.generation_config = GenerationConfig(**special)
        self.loss_type = "ForCausalLM"
        self.post_init()
        keep_only(self, {f"model.{name}" for name in model.get_trainable_params()})

    @property
    def _decoder(self) -> Decoder:
        return self.model.llma

    @classmethod
    def from_pretrained(cls, pretrained_path: Any, *, train: bool = True, **how: Any) -> AccessoryForCausalLM:
        """Load what `MetaModel.from_pretrained` loads of these arguments; without `train` it is only asked."""
        return cls(MetaModel.from_pretrained(pretrained_path, train=train, **how)).train(train)

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **_: Any,
    ) -> None:
        """Write what is trained as a trained part of ours, which every command takes, and as what Trainer resumes from.

        Files of the same names are replaced, others stay. Raises `CheckpointError` for what cannot be written.
        """
        if not is_main_process:
            return
        target, (stem, documents) = Path(save_directory), self.model.records()
        for name, content in documents.items():
            with fresh(target / name) as partial:
                write_json(partial, content)
        tensors = {name: tensor.contiguous() for name, tensor in self.model.trained_tensors().items()}
        if stem != "model":
            with fresh(target / f"{stem}.safetensors") as partial:
                save_file(tensors, partial)
            tensors = {f"model.llma.{name}": tensor for name, tensor in tensors.items()}
        with fresh(target / "model.safetensors") as partial:
            save_file(tensors, partial, metadata={"format": "pt"})

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        past_key_values: RowsCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
    ) -> CausalOutput | CausalLMOutputWithPast:
        """The first four arguments and the output are those of `CausalForward.forward`.

        use_cache: decode, for `generate`: with padding on the left, and logits of the last token alone [B, 1, V].
        Raises `DataError` for a batch that cannot be, `ConfigError` for `return_dict=False`.
        """
        if return_dict is False:
            raise ConfigError("return_dict=False: outputs are taken by name; leave it out.")
        if not use_cache or labels is not None:
            return super().forward(input_ids, attention_mask, labels, num_items_in_batch)
        if logits_to_keep not in (0, 1):
            raise ConfigError(f"logits_to_keep is {logits_to_keep}; while decoding, it is 1: give use_cache=False.")
        return self._decode(input_ids, attention_mask, past_key_values)

    @torch.no_grad()
    def _decode(self, ids: Tensor, mask: Tensor | None, cache: RowsCache | None) -> CausalLMOutputWithPast:
        """New tokens [B, N] of rows whose mask [B, S] covers what `cache` knows too -> logits [B, 1, V].

        Without a mask nothing is padding.
        """
        decoder = self._decoder
        check_ids("input_ids", ids, 0, decoder.args.vocab_size)
        if mask is None:
            mask = ids.new_ones(len(ids), ids.shape[1] + (cache.columns if cache else 0))
        rows = PaddedRows.of(mask, mask)
        if not rows.mask[:, -1].all():
            raise DataError("generate() takes prompts that are padded on the left: padding_side='left'.")
        with torch.autocast(decoder.frequencies.device.type, enabled=False):
            if cache is None:
                decoder.prepare_decoding()
                cache = RowsCache(decoder, len(ids), max(rows.lengths))
                prompts = [row.tolist() for row in rows.packed(ids).split(rows.lengths)]
                hidden = read_prompts(decoder, prompts, cache.layers, 0)
            else:
                new = ids.shape[1]
                cache.make_room(max(rows.lengths))
                starts = tuple(length - new for length in rows.lengths)
                with decoding():
                    hidden = decoder(ids.flatten(), decoder.sequences((new,) * len(ids), starts), cache.layers)
                hidden = hidden.view(len(ids), new, -1)[:, -1]
            cache.columns = rows.mask.shape[1]
            return CausalLMOutputWithPast(logits=next_token_logits(decoder, hidden)[:, None], past_key_values=cache)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """No: `forward` makes the cache."""
        return False

    def _reorder_cache(self, cache: RowsCache, rows: Tensor) -> RowsCache:
        cache.reorder_cache(rows)
        return cache

    def init_weights(self) -> None:
        """All are filled."""

    def tie_weights(self, *_: Any, **__: Any) -> None:
        """A head that is the embedding is one already."""
