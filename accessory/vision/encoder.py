"""Pictures -> rows of embeddings: what `MetaModel.encoder` is for a model that sees images."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch import Tensor

from accessory.data.pictures import Picture
from accessory.errors import ConfigError
from accessory.model.decoder import Decoder
from accessory.parallel.groups import model_parallel_group
from accessory.parallel.tensor import gather_slices
from accessory.vision.base import Vision
from accessory.vision.feature_cache import FeatureCache


class PictureEncoder:
    """The modules that `vision` has attached to `decoder`, which need not be filled yet.

    divides: whether ranks that share a model divide a batch's pictures among them, and exchange their features; else
    each computes all. threads: that read and scale pictures. cache: where features are looked up first.
    """

    def __init__(self, vision: Vision, decoder: Decoder, *, divides: bool = False, threads: int = 2) -> None:
        self.vision, self.decoder, self.divides = vision, decoder, divides
        self.cache: FeatureCache | None = None
        self.pool = ThreadPoolExecutor(max(threads, 1), thread_name_prefix="pictures")

    def __call__(self, contents: Sequence[Picture | str]) -> list[Tensor]:
        """The rows [place.rows, embedding_dim] of each content; a picture that is there twice is computed once.

        A collective of the model-parallel ranks, which must give the same contents. Raises `ConfigError` for a name,
        `DataError` for a picture that cannot be read.
        """
        if strange := [content for content in contents if not isinstance(content, Picture)]:
            raise ConfigError(f"An inset's content is {strange[0]!r}; expected a Picture, or a tensor of its rows.")
        places = {picture: place for place, picture in enumerate(dict.fromkeys(contents))}
        rows = self.vision.rows(self.decoder, self.features(list(places)))
        return [rows[places[picture]] for picture in contents]

    def no_rows(self) -> list[Tensor]:
        """One tensor [0, embedding_dim] that gives all that is trained behind the encoder a gradient of zeros.

        Data-parallel ranks reduce the same gradients so, whether or not their micro-batch has a picture. Empty where
        nothing of it is trained, or no gradient is wanted.
        """
        behind = (p for name in self.vision.projection for p in _parameters(getattr(self.decoder, name)))
        if not (torch.is_grad_enabled() and any(p.requires_grad for p in behind)):
            return []
        rows = self.vision.rows(self.decoder, self._nothing())
        return [rows.flatten(0, 1)]

    def features(self, pictures: list[Picture]) -> Tensor:
        """The frozen encoder's features [n, tokens, width] of different pictures. A collective, as a call is."""
        ranks = dist.get_world_size(model_parallel_group()) if self.divides else 1
        if ranks == 1 or len(pictures) < 2:
            return self._computed(pictures)
        share, rank = -(-len(pictures) // ranks), dist.get_rank(model_parallel_group())
        mine = self._computed(pictures[rank * share : (rank + 1) * share])
        padded = mine.new_zeros(share, *mine.shape[1:])
        padded[: len(mine)] = mine
        return gather_slices(padded, 0)[: len(pictures)]

    def _computed(self, pictures: list[Picture]) -> Tensor:
        return self.cache.features(pictures, self._encoded) if self.cache else self._encoded(pictures)

    def _encoded(self, pictures: list[Picture]) -> Tensor:
        if not pictures:
            return self._nothing()
        pixels = torch.stack(list(self.pool.map(Picture.pixels, pictures)))
        return self.vision.features(self.decoder, pixels)

    def _nothing(self) -> Tensor:
        """Features of no picture."""
        shape = (0, *self.vision.feature_shape)
        return torch.empty(shape, dtype=self.decoder.dtype, device=self.decoder.frequencies.device)


def _parameters(part: torch.nn.Module | torch.nn.Parameter) -> list[torch.nn.Parameter]:
    return [part] if isinstance(part, torch.nn.Parameter) else list(part.parameters())
