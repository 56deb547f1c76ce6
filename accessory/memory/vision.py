"""The memory of what sees images on a rank: the frozen encoder, what it takes while it runs, what is kept behind it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from accessory.method import Attachment
from accessory.model.decoder import Decoder
from accessory.parallel.groups import Layout
from accessory.quant import PackedWeight
from accessory.quant.products import memory_to_multiply
from accessory.vision import Vision
from accessory.vision.base import IMAGES_AT_A_TIME


class VisionMemory:
    """Bytes for micro-batches of at most `pictures` pictures; the decoder may be on the meta device.

    divides: whether ranks that share a model divide the pictures among them, which they do where that takes less.
    weights: of the encoder. working: the peak while it runs, with the features of all pictures. kept: what is kept of
    the way from features to rows for its backward. workspace, buffer: as of `memory_to_multiply`, the most of any
    product.
    """

    def __init__(self, decoder: Decoder, vision: Vision, attachment: Attachment, layout: Layout, pictures: int) -> None:
        self.vision, self.dtype, self.ranks = vision, decoder.dtype, layout.mp_size
        encoder = getattr(decoder, vision.encoder)
        self.weights = sum(p.nbytes for p in encoder.parameters())
        whole, shared = self._working(pictures, 1), self._working(pictures, self.ranks)
        self.divides, self.working = shared < whole, min(shared, whole)
        self.kept = _kept_by_rows(decoder, vision, attachment, pictures) if pictures else 0
        tokens = min(pictures, IMAGES_AT_A_TIME) * vision.inner_tokens
        found = [
            memory_to_multiply([module], [0], tokens, decoder.dtype, layout.device, backward=False)
            for module in encoder.modules()
            if isinstance(module, PackedWeight)
        ]
        self.workspace, self.buffer = (max(each) for each in zip(*found, (0, 0), strict=True))

    def _working(self, pictures: int, ranks: int) -> int:
        """The peak where `ranks` divide the pictures, and exchange features that are padded to equal shares."""
        if not pictures:
            return 0
        share, (tokens, width) = -(-pictures // ranks), self.vision.feature_shape
        exchanged = 2 * share * ranks * tokens * width * self.dtype.itemsize if ranks > 1 else 0
        return max(self.vision.working_bytes(share, self.dtype), exchanged)


class _Rows(nn.Module):
    """What is behind the encoder, as a module."""

    def __init__(self, decoder: Decoder, vision: Vision) -> None:
        super().__init__()
        self.decoder, self.vision = decoder, vision

    def forward(self, features: Tensor) -> Tensor:
        """Features [n, tokens, width] -> rows [n, rows, embedding_dim]."""
        return self.vision.rows(self.decoder, features)


def _kept_by_rows(decoder: Decoder, vision: Vision, attachment: Attachment, pictures: int) -> int:
    """What `Vision.rows` keeps, measured on a CPU with uninitialized numbers: linear in the number of pictures."""
    stand_ins = {}
    for name, p in decoder.named_parameters():
        if name.split(".")[0] in vision.projection:
            stand_in = torch.empty(p.shape, dtype=p.dtype)
            stand_ins[f"decoder.{name}"] = stand_in.requires_grad_(name in attachment.trainable)
    parameters = {tensor.untyped_storage()._cdata for tensor in stand_ins.values()}

    def kept(count: int) -> int:
        """For so many pictures."""
        saved: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

        def note(tensor: Tensor) -> Tensor:
            """Keep its storage in mind."""
            if (address := tensor.untyped_storage()._cdata) not in parameters:
                saved[address] = tensor.untyped_storage()
            return tensor

        features = torch.empty((count, *vision.feature_shape), dtype=decoder.dtype)
        with torch.enable_grad(), saved_tensors_hooks(note, lambda tensor: tensor):
            functional_call(_Rows(decoder, vision), stand_ins, (features,))
        return sum(storage.nbytes() for storage in saved.values())

    one, two = kept(1), kept(2)
    return one + (two - one) * (pictures - 1)
