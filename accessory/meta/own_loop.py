"""Training in a loop of one's own: what is trained, batches, and a checkpoint of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from accessory.checkpoint.manifest import MANIFEST_FILE, manifest_of
from accessory.checkpoint.run_record import RUN_FILE, run_record
from accessory.checkpoint.save import fresh_directory, write_json, write_tensors
from accessory.data.batch import PackedBatch
from accessory.data.corpus import Corpus, build_corpus
from accessory.data.order import GlobalOrder
from accessory.errors import CheckpointError, ConfigError


class OwnLoop:
    """Part of `MetaModel`."""

    def get_trainable_params(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of what is trained or was, for an optimizer; names begin with `llma.`, as upstream's do."""
        encoder = f"llma.{self.vision.encoder}." if self.vision else "-"  # it is frozen always
        return {name: p for name, p in self._to_save().items() if not name.startswith(encoder)}

    def _to_save(self) -> dict[str, nn.Parameter]:
        trained = {f"llma.{name}" for name in self._loaded.trained} if self._loaded else ()
        return {name: p for name, p in self.named_parameters() if p.requires_grad or name in trained}

    def corpus(self, data_config: str | Path | Sequence[str | Path], *, max_words: int = 1024, **how: Any) -> Corpus:
        """What `--data_config` names, laid out and tokenized for this model; `how`: as for `build_corpus`."""
        given = [data_config] if isinstance(data_config, str | Path) else data_config
        how = {"pictures": self.vision.place if self.vision else None} | how
        return build_corpus([Path(path) for path in given], self.tokenizer, max_words=max_words, **how)

    def batches(self, corpus: Corpus, *, batch_size: int = 16, epochs: int = 1, seed: int = 0) -> Iterator[PackedBatch]:
        """Batches of so many documents, shuffled in each epoch as the engine does, on the model's device."""
        share = not (self._loaded and self._loaded.blueprint.method.drops_out)
        order = GlobalOrder(corpus, batch_size=batch_size, accum_iter=1, seed=seed, share_prefixes=share)
        for epoch in range(epochs):
            for step in range(order.steps_per_epoch):
                for batch in order.micro_batches(epoch, step):
                    yield batch.to(self.llma.frequencies.device)

    def save(self, directory: str | Path, corpus: Corpus | None = None) -> None:
        """Write what is trained as a checkpoint, which every command takes; of a fully trained model, all of it.

        corpus: what it was trained on, whose prompt layout is then that of its questions. A checkpoint that lies at
        `directory` is replaced. Raises `CheckpointError` for another directory, and for what cannot be written.
        """
        target, (stem, documents) = Path(directory), self.records(corpus)
        if target.exists() and not (target / MANIFEST_FILE).is_file():
            raise CheckpointError(f"{target}: is there already; expected a new directory, or a checkpoint to replace.")
        with fresh_directory(target) as partial:
            write_tensors(partial, stem, self.trained_tensors().items())
            for name, content in documents.items():
                write_json(partial / name, content)
            self.tokenizer.save(partial)
            write_json(partial / MANIFEST_FILE, manifest_of(partial, step=0, loss=None))

    def trained_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds, on the CPU, by the names it has there."""
        return {name.removeprefix("llma."): p.detach().cpu() for name, p in self._to_save().items()}

    def records(self, corpus: Corpus | None = None) -> tuple[str, dict[str, Any]]:
        """(first part of the name of the files of weights, JSON by file name) of a checkpoint.

        Raises `ConfigError` for a model that `from_pretrained` has not loaded.
        """
        if self._loaded is None:
            raise ConfigError("save() writes a model of MetaModel.from_pretrained; finetune() saves what it trains.")
        sources, blueprint, *_ = self._loaded
        layouts = corpus.documents_by_prompt_layout() if corpus else dict.fromkeys(self.prompt_layouts, 0)
        data, system = (corpus.fingerprint, corpus.told.system) if corpus else ("", self.system)
        return "model" if blueprint.method.trains_base else "trainable", {
            "config.json": blueprint.settings(),
            "meta.json": {"llama_type": blueprint.llama_type},
            RUN_FILE: run_record({}, sources, blueprint.quant_type, data, layouts, system=system),
        }
