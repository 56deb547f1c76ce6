"""Answers: the same tokens from recorded graphs as from kernels that are launched one by one, and as from the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch

from accessory.generate import generate_tokens, next_token_logits, read_prompts, static_memory
from accessory.kernels import decoding_kernels
from accessory.kernels.trial import faults_of
from accessory.kernels.triton import DECODING, working
from accessory.model.decoder import Decoder
from accessory.model.decoding import decoding
from accessory.model.decoding_chain import why_not
from accessory.parallel.groups import Layout
from tools.gpu_checks.check import Findings, Ground, check
from tools.gpu_checks.families import built, training
from tools.gpu_checks.launches import kernels_of
from tools.model_sizes import SIZES

CASES = (
    ("llama", None), ("llama", "nf4"), ("llama", "fp4_single"), ("llama", "int8"), ("mistral", "int3_g64"),
    ("baichuan", "nf4"), ("gpt_neox", "int2_g64"), ("qwen3", "nf4"), ("opt", "nf4"), ("glm4", "int4_g128"),
)  # fmt: skip
"""Families and storages."""
ALIKE = 0.9
"""Share of tokens that must be the CPU's: sums in another order may turn a choice between two likely tokens, and all
that follows it."""


@check(16, needs_cuda=True)
def graphs(ground: Ground, found: Findings) -> None:
    """Greedy answers of three prompts, one of which ends before the others and needs a second span of the cache."""
    equal = count = recorded = 0
    for family, kind in CASES[:: ground.pick(1, 4)]:
        with found.case(name := f"{family} {kind}"):
            decoder = _decoder(family, kind, ground.layout)
            static, growing = (answers(decoder, ground, in_place=in_place) for in_place in (True, False))
            found.expect(static == growing, f"{name}: {static} from fixed places, {growing} from growing ones")
            recorded += len(decoder.answering.replays._recorded)
            if ground.cuda:
                found.expect(decoder.answering.replays._recorded, f"{name}: no graph was recorded")
            others = answers(_decoder(family, kind, Layout()), ground, in_place=False)
            pairs = [
                pair for mine, theirs in zip(growing, others, strict=True) for pair in zip(mine, theirs, strict=False)
            ]
            equal, count = equal + sum(a == b for a, b in pairs), count + len(pairs)
    found.figures |= {"graphs": recorded, "tokens": count, "as_on_the_cpu": equal}
    found.expect(equal >= ALIKE * count, f"{equal} of {count} tokens are those of the CPU")


@check(8, needs_cuda=True)
def logits(ground: Ground, found: Findings) -> None:
    """Of a token after a prompt, in every dtype: from fixed places, beside those of the whole document at once."""
    for dtype, allowed in ((torch.float32, 1e-4), (torch.bfloat16, 4e-2), (torch.float16, 6e-3)):
        for kind in (None, "nf4", "int3_g64"):
            with found.case(name := f"{kind} {dtype}"), torch.inference_mode():
                decoder = _decoder("llama", kind, ground.layout, dtype)
                tokens = torch.arange(9, device=ground.device)
                whole = decoder(tokens, decoder.sequences((9,)))[-1:]
                wanted = whole @ decoder.head_weight.to(dtype).t()
                memory = static_memory.StaticMemory.of(decoder, 1, 64)
                decoder(tokens[:8], decoder.sequences((8,)), [layer.documents(0, 1) for layer in memory.layers])
                for again in range(3):  # done, recorded, replayed
                    memory.begin([8])
                    memory.tokens[:1].copy_(tokens[8:])
                    found.close(f"{name}, time {again}", memory.step(1, 64)[:, : decoder.args.vocab_size],
                                wanted[:, : decoder.args.vocab_size], allowed)  # fmt: skip


@check(3, needs_cuda=True)
def chosen(ground: Ground, found: Findings) -> None:
    """Triton's kernels for few rows pass their trial in every dtype."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32) if ground.cuda else ():
        missing = tuple(sorted(set(DECODING) - working(ground.device, dtype, DECODING)))
        for name, fault in faults_of("triton", missing, ground.device, dtype).items():
            found.faults.append(f"{name} in {dtype} fails its trial: {fault}")
        found.expect(missing or decoding_kernels(ground.device, dtype), f"they are not used in {dtype}")


@check(9, needs_cuda=True)
def wide(ground: Ground, found: Findings) -> None:
    """Blocks as wide as 7B's and 70B's, with LoRA: a token of 1, 3 and 8 documents in fixed places and in growing ones.

    It is computed three times in fixed places: done, recorded, replayed. Kernels are counted of one that is not.
    """
    for size, blocks, longest in (("7B", 2, 700), ("70B", 1, 1100)):
        with found.case(size), TemporaryDirectory() as folder:
            file = Path(folder, "shape.json")
            file.write_text(json.dumps(SIZES[ground.pick(size, "tiny")] | {"n_layers": blocks, "vocab_size": 32000}))
            decoder = training(model=str(file)).engine(ground.layout).model.llma.eval()
            for name, parameter in decoder.named_parameters():
                if "lora_b" in name:
                    torch.nn.init.normal_(parameter, std=0.02)
            decoder.requires_grad_(False).prepare_decoding()
            for count in (1, 3, 8):
                lengths = [max(ground.pick(longest, 9) - 91 * i, 2) for i in range(count)]
                _compare(found, f"{size}, {count} documents", decoder, lengths)
            chain, memory = decoder.answering.chain, decoder.answering
            with torch.inference_mode():
                made = kernels_of(lambda memory=memory: memory.forward(1, static_memory.SHORTEST), ground)
            found.figures[f"{size}_kernels_of_{blocks}_blocks"] = made.total()
            found.figures[size] = why_not(decoder) or ("in few launches" if chain else "kernels fell back")
            found.expect(chain or not ground.cuda, f"{size}: {found.figures[size]}")
            del decoder


@torch.inference_mode()
def _compare(found: Findings, name: str, decoder: Decoder, lengths: list[int]) -> None:
    """The logits of a token after prompts of `lengths` random tokens."""
    device, count, longest = decoder.frequencies.device, len(lengths), max(lengths) + 1
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(decoder.args.vocab_size, (length,), generator=generator).tolist() for length in lengths]
    token = torch.arange(count, device=device)
    cache = decoder.new_cache(count, longest)
    read_prompts(decoder, prompts, cache)
    with decoding():
        hidden = decoder(token, decoder.sequences((1,) * count, tuple(lengths)), cache)
    wanted = next_token_logits(decoder, hidden)
    memory = static_memory.StaticMemory.of(decoder, count, longest)
    read_prompts(decoder, prompts, [layer.documents(0, count) for layer in memory.layers])
    for time in range(3):
        memory.begin(lengths)
        memory.tokens[:count].copy_(token)
        rows, span = static_memory.documents_together(count), static_memory.span_of(longest, memory.longest)
        found.close(f"{name}, time {time}", memory.step(rows, span)[:count], wanted, 3e-2)


def answers(decoder: Decoder, ground: Ground, *, in_place: bool) -> list[list[int]]:
    """Tokens of each prompt. in_place: in fixed places, as on a GPU, or not."""
    longest = ground.pick(252, 12)
    prompts = [[(7 * i) % 500 for i in range(longest - 2)], [3, 1, 4], [9]]
    with patch.object(static_memory, "launches_count", lambda _device: in_place):
        steps = generate_tokens(decoder, prompts, max_gen_len=16, max_seq_len=longest + 6, stop_ids=set())
        found = list(steps)
    return [[step[i] for step in found if step[i] is not None] for i in range(len(prompts))]


def _decoder(family: str, kind: str | None, layout: Layout, dtype: torch.dtype = torch.float32) -> Decoder:
    """A small model that is asked."""
    decoder, _ = built((family, "lora", kind), dtype)
    return decoder.to(layout.device).requires_grad_(False).eval()


CHECKS = [chosen, graphs, logits, wide]
