"""Reading prompts into the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from accessory.kernels.avx512.packed_gemv import MOST_ROWS
from accessory.model.cache import LayerCache
from accessory.model.decoder import Decoder
from accessory.model.decoding import decoding


def read_prompts(decoder: Decoder, prompts: list[list[int]], cache: list[LayerCache], known: int = 0) -> Tensor:
    """Fill a `cache` that holds the first `known` tokens of the prompt, or prompts; returns the decoder's output for
    each prompt's last token [B, embedding_dim].

    On a CPU, prompts are read in groups that the kernel for few rows can take: kernels round differently, and an answer
    should not depend on the other prompts of the batch. A prompt that occurs several times is read once.
    """
    if len(prompts) > 1 and all(prompt == prompts[0] for prompt in prompts):
        last = read_prompts(decoder, prompts[:1], [layer.documents(0, 1) for layer in cache], known)
        for layer in cache:
            layer.copy_first(len(prompts[0]))
        return last.expand(len(prompts), -1)
    device = decoder.frequencies.device
    most = MOST_ROWS if device.type == "cpu" else sum(map(len, prompts))
    prompts, lasts, begin = [prompt[known:] for prompt in prompts], [], 0
    while begin < len(prompts):
        end = begin + 1
        while end < len(prompts) and sum(map(len, prompts[begin : end + 1])) <= most:
            end += 1
        lengths = tuple(len(prompt) for prompt in prompts[begin:end])
        tokens = torch.tensor([token for prompt in prompts[begin:end] for token in prompt], device=device)
        part = [layer.documents(begin, end) for layer in cache]
        with decoding():
            hidden = decoder(tokens, decoder.sequences(lengths, (known,) * len(lengths)), part)
        lasts.append(hidden[torch.tensor(lengths, device=device).cumsum(0) - 1])
        begin = end
    return torch.cat(lasts)
