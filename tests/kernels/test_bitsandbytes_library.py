"""bitsandbytes' C functions with memory of ours, against its own operations; and torch.compile, which waits."""

from __future__ import annotations

import pytest
import torch

from accessory.kernels import bitsandbytes_library as library
from accessory.kernels.bitsandbytes_library import functional, plain_scales, unpack_into

needs_library = pytest.mark.skipif(not library.AVAILABLE, reason="bitsandbytes found no library for this machine")


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_unpacking_is_bitsandbytes_own(kind: str, dtype: torch.dtype) -> None:
    """To the bit, and nothing behind the matrix is written."""
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(0))
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
    memory = torch.full((25 * 128,), 9, dtype=dtype)
    unpack_into(memory[: 24 * 128].view(24, 128), codes.flatten(), state.absmax, (24, 128), kind)
    table = functional.get_4bit_type(kind, device="cpu").double()
    numbers = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], 1).flatten().long()
    wanted = table[numbers] * state.absmax.double().repeat_interleave(64)
    torch.testing.assert_close(memory[: 24 * 128].double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-7)
    assert (memory[24 * 128 :] == 9).all()


@pytest.mark.parametrize("available", [True, False])
def test_scales_of_scales(monkeypatch: pytest.MonkeyPatch, available: bool) -> None:
    """With the library and without it: its codebook times the outer scales, and the offset."""
    monkeypatch.setattr(library, "AVAILABLE", available and library.AVAILABLE)
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 256, (600,), generator=generator, dtype=torch.uint8)
    codebook, outer = (torch.randn(count, generator=generator) for count in (256, 3))
    wanted = codebook[codes.long()].double() * outer.double().repeat_interleave(256)[:600] + 0.5
    found = plain_scales(codes, codebook, outer, torch.tensor(0.5))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)


def test_torch_compile_waits_for_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, with its options, as a decorator of either form; and torch's own stands in its place again."""
    assert torch.compile is library._compile
    compiled = []
    monkeypatch.setattr(library, "_compile", lambda function, **options: compiled.append(options) or function)
    plain = library._compile_at_first_call(lambda x: x + 1)
    chosen = library._compile_at_first_call(dynamic=True)(lambda x: x + 2)
    assert compiled == []
    assert [plain(1), plain(2), chosen(1)] == [2, 3, 3] and compiled == [{}, {"dynamic": True}]
