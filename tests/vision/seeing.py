"""Tiny models that see images: their documents, upstream's files, and the same by transformers in float64."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from accessory.data.batch import IGNORE, Document, Inset, PackedBatch
from accessory.data.pictures import Picture, PicturePlace
from accessory.export import Destination, convert

BOS = 0
PROJECTIONS = {"qformerv2": ("qformer_proj.0", "qformer_proj.1"), "clip": ("clip_proj", "clip_proj_norm")}


def picture(number: int) -> Picture:
    """Random pixels, as a PNG."""
    from PIL import Image  # of an extra

    pixels = np.random.default_rng(number).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return Picture(file.getvalue(), "padded_resize", 28)


def document(number: int, place: PicturePlace, seen: Picture | None) -> Document:
    """BOS, a question of ten random tokens and an answer of five, with the picture where the model has it."""
    generator = np.random.default_rng(100 + number)
    text = [BOS, *generator.integers(2, 500, 15).tolist()]
    rows = place.rows if seen else 0
    start = 0 if place.before_start else 1
    tokens = [*text[:start], *[0] * rows, *text[start:]]
    labels = [IGNORE] * (rows + 10) + text[11:] + [IGNORE]
    insets = (Inset(start, rows, seen),) if seen else ()
    return Document(np.array(tokens), np.array(labels), number, insets)


def documents(place: PicturePlace) -> list[Document]:
    """Image, text, image, image."""
    seen = (picture(0), None, picture(1), picture(2))
    return [document(number, place, image) for number, image in enumerate(seen)]


def packed(*documents: Document) -> PackedBatch:
    """In the order given."""
    return PackedBatch.pack(documents, share=False)


class Reference:
    """transformers' parts in float64: its encoder, a Linear and a LayerNorm, its language model.

    state: the projection's tensors by our names, from which leaves with a gradient are made.
    """

    def __init__(self, name: str, encoder: nn.Module, language: nn.Module, state: Mapping[str, Tensor]) -> None:
        self.name, self.encoder, self.language = name, copy.deepcopy(encoder).double(), language.double()
        self.state = {key: value.detach().double().requires_grad_() for key, value in state.items()}

    def rows(self, seen: Picture) -> Tensor:
        """[rows, D]."""
        pixels = seen.pixels()[None].double()
        if self.name == "clip":
            eyes = self.encoder.vision_model
            found = self.encoder.visual_projection(eyes.post_layernorm(eyes(pixels).last_hidden_state))
        else:
            found = self.encoder.get_qformer_features(pixel_values=pixels)
            found = getattr(found, "last_hidden_state", found)
        linear, norm = PROJECTIONS[self.name]
        found = F.linear(found[0], self.state[f"{linear}.weight"], self.state[f"{linear}.bias"])
        found = F.layer_norm(found, found.shape[-1:], self.state[f"{norm}.weight"], self.state[f"{norm}.bias"])
        if self.name == "clip":
            return found
        return torch.cat([self.state["start_img"][0], found, self.state["end_img"][0]])

    def logits(self, document: Document) -> Tensor:
        """[S, V]."""
        embedded = self.language.get_input_embeddings()(torch.from_numpy(document.tokens))
        for inset in document.insets:
            rows = self.rows(inset.content)
            embedded = torch.cat([embedded[: inset.start], rows, embedded[inset.start + inset.rows :]])
        return self.language(inputs_embeds=embedded[None]).logits[0]

    def loss(self, document: Document) -> Tensor:
        """Summed over its labels."""
        return F.cross_entropy(self.logits(document), torch.from_numpy(document.labels), reduction="sum")


def write_stage_one(directory: Path, base: Path, blip2: Path, ranks: int = 2) -> None:
    """What LLaMA2-Accessory saves of llama_qformerv2: shards with the base's slices, and all that sees in each.

    Random projection and tags. `params.json` and the tokenizer lie beside `directory`, in its parent.
    """
    convert([base], directory / "text", Destination("upstream", dtype="fp32", ranks=ranks))
    generator = torch.Generator().manual_seed(3)
    dim = json.loads((base / "config.json").read_text())["hidden_size"]
    seeing = {f"qformer.{name}": tensor for name, tensor in load_file(blip2 / "model.safetensors").items()
              if name.startswith(("vision_model.", "qformer.", "query_tokens"))}  # fmt: skip
    width = seeing["qformer.query_tokens"].shape[-1]
    shapes = {"qformer_proj.0.weight": (dim, width), "qformer_proj.0.bias": (dim,), "qformer_proj.1.weight": (dim,),
              "qformer_proj.1.bias": (dim,), "start_img": (1, 1, dim), "end_img": (1, 1, dim)}  # fmt: skip
    seeing |= {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    for file in sorted((directory / "text").glob("*.pth")):
        state = torch.load(file, weights_only=True)["model"] | {f"llma.{name}": value for name, value in seeing.items()}
        torch.save({"model": state}, directory / file.name)
    (directory / "text" / "config.json").rename(directory.parent / "params.json")
    for file in (directory / "text").iterdir():
        file.rename(directory.parent / file.name) if file.name.startswith("tokenizer") else file.unlink()
    (directory / "text").rmdir()
