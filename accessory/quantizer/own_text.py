"""Text that the base itself writes, as calibration text beside the data's (as LLM-QAT, Liu et al. 2023).

A data file is about a few things in one style; what is fitted to it alone is worse elsewhere. Draws from the model's
own distribution are about all it knows, as often as it knows them, and need no further data.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from accessory.checkpoint.load import fill_module
from accessory.checkpoint.whole import WholeModel
from accessory.model.decoder import Decoder
from accessory.model.decoding import decoding
from accessory.parallel.groups import Layout
from accessory.quantizer.blocks import batches
from accessory.quantizer.folder import Folder
from accessory.tokenizer import Tokenizer

TOGETHER = 32
"""Rows that are written at the same time."""


def own_rows(
    model: WholeModel,
    count: int,
    length: int,
    seed: int,
    folder: Folder,
    *,
    dtype: torch.dtype,
    layout: Layout,
    say: Callable[[str], None],
) -> Tensor:
    """Token ids int64 [count, length] on the CPU, drawn by their probabilities; the first token begins a text.

    Weights that a file holds in `dtype` are used where they are mapped. `folder` keeps what is done. A collective:
    ranks divide the rows, and get all.
    """
    parts, ranks = [len(rows) for rows in batches(count, TOGETHER)], dist.get_world_size(folder.group)
    done = next((i for i in range(len(parts)) if not (folder.path / _file(i)).exists()), len(parts))
    if done < len(parts):
        decoder, start = _decoder(model, dtype, layout), _start(model.tokenizer)
        for first in range(done, len(parts), ranks):
            found = [torch.empty(rows, length, dtype=torch.int64) for rows in parts[first : first + ranks]]
            if (own := first + layout.dp_rank) < len(parts):
                generator = torch.Generator(layout.device).manual_seed(seed * 10007 + own)
                found[layout.dp_rank] = drawn_rows(decoder, start, parts[own], length, generator).cpu()
            for rank, ids in enumerate(found):
                _share(ids, rank, folder.group, layout.device)
                folder.write_tensors(_file(first + rank), {"ids": ids})
            say(f"own text: {sum(parts[: first + ranks])}/{count} rows")
    return torch.cat([folder.read_tensors(_file(i))["ids"] for i in range(len(parts))])


@torch.no_grad()
def drawn_rows(decoder: Decoder, start: list[int], rows: int, length: int, generator: torch.Generator) -> Tensor:
    """int64 [rows, length] on the decoder's device: `start`, and tokens drawn one after the other by `generator`."""
    device = decoder.frequencies.device
    ids = torch.tensor(start, device=device).expand(rows, -1)
    cache, read = decoder.new_cache(rows, length), 0
    while ids.shape[1] < length:
        new = ids.shape[1] - read
        with decoding():
            hidden = decoder(ids[:, read:].flatten(), decoder.sequences((new,) * rows, (read,) * rows), cache)
        last = hidden.view(rows, new, -1)[:, -1]
        logits = (last @ decoder.head_weight.to(last.dtype).t())[:, : decoder.args.vocab_size]
        read = ids.shape[1]
        ids = torch.cat([ids, torch.multinomial(logits.float().softmax(1), 1, generator=generator)], 1)
    return ids[:, :length]


def _decoder(model: WholeModel, dtype: torch.dtype, layout: Layout) -> Decoder:
    """The whole model, for asking."""
    decoder = Decoder(model.args, dtype=dtype)
    decoder.place(layout.device)
    fill_module(decoder, "", model.tensors, layout, share=True)
    return decoder.eval()


def _start(tokenizer: Tokenizer) -> list[int]:
    """What a text begins with; of a tokenizer that puts nothing there, the token that stands between texts."""
    between = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    return [*tokenizer.start_ids] or [between]


def _share(ids: Tensor, rank: int, group: dist.ProcessGroup, device: torch.device) -> None:
    """Give all ranks what `rank` has, in place."""
    if dist.get_world_size(group) > 1:
        there = ids.to(device)
        dist.broadcast(there, dist.get_global_rank(group, rank), group=group)
        ids.copy_(there)


def _file(number: int) -> str:
    return f"own-text-{number}.safetensors"
