"""PyTorch's fused attention on CUDA, without a GPU: which kernel any machine takes, and what it is given.

Stand-ins refuse what the operations refuse on a GPU and compute the rest in float64; fake tensors tell of shapes and of
what is kept. What only a GPU can show is that the operations compute what they are documented to.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from accessory.kernels import fused_attention
from accessory.kernels.documents import Documents
from accessory.kernels.fused_attention import Fused, fused_for
from accessory.kernels.plain.document_attention import attend
from tests.kernels.operations import Operations

VOLTA, TURING, AMPERE, GEFORCE_30, HOPPER, GEFORCE_50 = (7, 0), (7, 5), (8, 0), (8, 6), (9, 0), (12, 0)
HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
LENGTHS = (12, 1, 30, 2)
ERROR = {HALF: 2e-3, BF16: 1e-2, FP32: 1e-6}


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "wanted"),
    [
        (HOPPER, BF16, 128, Fused("flash", BF16, 128)),
        (AMPERE, HALF, 256, Fused("flash", HALF, 256)),
        (HOPPER, BF16, 136, Fused("flash", BF16, 136)),  # with ALiBi's channels
        (HOPPER, BF16, 20, Fused("flash", BF16, 24)),
        (GEFORCE_50, BF16, 192, Fused("flash", BF16, 192)),
        (GEFORCE_30, BF16, 208, Fused("flash", BF16, 256)),
        (GEFORCE_50, HALF, 224, Fused("flash", HALF, 256)),
        (HOPPER, BF16, 208, Fused("flash", BF16, 208)),
        (HOPPER, BF16, 264, Fused("efficient", BF16, 264)),
        (HOPPER, FP32, 128, Fused("efficient", FP32, 128)),
        (HOPPER, FP32, 100, Fused("efficient", FP32, 104)),
        (TURING, HALF, 128, Fused("efficient", HALF, 128)),
        (VOLTA, BF16, 64, Fused("efficient", FP32, 64)),
        (TURING, FP32, 64, Fused("efficient", FP32, 64)),
        (HOPPER, torch.float64, 64, None),
    ],
)
def test_by_machine_dtype_and_width(
    capability: tuple[int, int], dtype: torch.dtype, width: int, wanted: Fused | None
) -> None:
    """Flash where it is, with heads as wide as it takes them; the other one elsewhere, and for fp64 none."""
    assert fused_for(capability, dtype, width) == wanted


def test_on_a_cpu_there_is_none_and_plans_are_for_hopper() -> None:
    """Without a GPU to ask."""
    assert fused_attention.fused_on(torch.device("cpu"), BF16, 128) is None
    assert fused_attention.fused_on(torch.device("cuda"), BF16, 128) == fused_for(HOPPER, BF16, 128)


def leaves(heads: int, kv_heads: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Random q, k and v of documents of LENGTHS."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(sum(LENGTHS), n, width, generator=generator).to(dtype).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    ]


def softmax_of_one_matrix(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, before: int, scale: float) -> Tensor:
    """In float64; a query sees `before` keys beside its own, all for -1."""
    wide = [t.double() for t in (q, k, v)]
    wide[1:] = [t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in wide[1:]]
    document = torch.bucketize(torch.arange(len(q)), offsets[1:], right=True)
    distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
    seen = (document[:, None] == document) & (distance >= 0) & (distance <= (len(q) if before < 0 else before))
    scores = torch.einsum("ihe,jhe->hij", *wide[:2]) * scale
    return torch.einsum("hij,jhe->ihe", scores.masked_fill(~seen, -torch.inf).softmax(-1), wide[2]).to(q.dtype)


def flash(
    capability, q, k, v, starts, ends, most_queries, most_keys, dropout, causal, debug, *, scale, **window
) -> tuple:
    """As the operation on a GPU of `capability`, with its checks."""
    assert capability >= AMPERE, "FlashAttention only supports Ampere GPUs or newer."
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in (HALF, BF16), "FlashAttention only support fp16 and bf16 data type"
    assert q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    assert q.shape[1] % k.shape[1] == 0
    assert starts is ends and starts.dtype == torch.int32 and (dropout, debug) == (0.0, False)
    assert most_queries == most_keys == int(starts.diff().max())
    assert window["window_size_right"] == 0 and causal == (window["window_size_left"] == -1)
    return (softmax_of_one_matrix(q, k, v, starts, window["window_size_left"], scale),)


def efficient(
    capability, q, k, v, bias, starts, ends, most_queries, most_keys, dropout, mask, saves, *, scale, window_size
) -> tuple:
    """As the operation on a GPU of `capability`, with its checks."""
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype != BF16 or capability >= AMPERE
    assert len(q) == 1 and q.shape == k.shape == v.shape and q.shape[-1] % 8 == 0
    assert bias is None and starts is ends and starts.dtype == torch.int32 and (dropout, mask, saves) == (0.0, 1, True)
    assert most_queries == most_keys == int(starts.diff().max())
    out = softmax_of_one_matrix(q[0], k[0], v[0], starts, -1 if window_size is None else window_size - 1, scale)
    return out[None], *(torch.tensor(number) for number in (7, 8, 9)), most_queries, most_keys


def efficient_backward(
    dout, q, k, v, bias, out, starts, ends, most_queries, most_keys, statistics, dropout, seed, offset, mask,
    bias_learns, *, scale, window_size,
) -> tuple:  # fmt: skip
    """The operation's own gradient, which is given the window anew."""
    assert (bias, dropout, mask, bias_learns) == (None, 0.0, 1, False) and starts is ends and dout.shape == q.shape
    assert list(map(int, (statistics, seed, offset))) == [7, 8, 9]
    assert most_queries == most_keys == int(starts.diff().max())
    given = [t[0].detach().requires_grad_() for t in (q, k, v)]
    with torch.enable_grad():
        found = softmax_of_one_matrix(*given, starts, -1 if window_size is None else window_size - 1, scale)
    assert torch.equal(found, out[0])
    return *(t[None] for t in torch.autograd.grad(found, given, dout[0])), None


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int]], None]:
    """From now on, tensors are taken to lie on a GPU of a capability, and its kernels are stand-ins."""

    def put(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", partial(flash, capability))
        monkeypatch.setattr(torch.ops.aten, "_efficient_attention_forward", partial(efficient, capability))
        monkeypatch.setattr(torch.ops.aten, "_efficient_attention_backward", efficient_backward)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
        monkeypatch.setattr(
            "accessory.kernels.plain.document_attention.fused_on",
            lambda _device, dtype, width: fused_attention._tried(torch.device("cpu"), dtype, width),
        )

    fused_attention._tried.cache_clear()
    yield put
    fused_attention._tried.cache_clear()


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "kernel"),
    [(HOPPER, BF16, 16, "flash"), (HOPPER, BF16, 20, "flash"), (GEFORCE_30, HALF, 200, "flash"),
     (HOPPER, BF16, 300, "efficient"), (TURING, HALF, 20, "efficient"), (VOLTA, BF16, 16, "efficient"),
     (HOPPER, FP32, 12, "efficient")],
)  # fmt: skip
@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_equals_float64(on_gpu, capability, dtype, width: int, kernel: str, window: int | None, kv_heads: int) -> None:
    """Result and gradients, of machines whose flash lacks the capability, the dtype or the width."""
    on_gpu(capability)
    given = leaves(4, kv_heads, width, dtype)
    assert fused_attention._tried(torch.device("cpu"), dtype, width).kernel == kernel
    wide = [t.detach().double().requires_grad_() for t in given]
    documents = Documents.build(LENGTHS)
    found = attend(*given, documents, window)
    before = -1 if window is None else window - 1
    wanted = softmax_of_one_matrix(*wide, documents.offsets, before, 1 / math.sqrt(width))
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours, theirs = torch.autograd.grad(found, given, weights.to(dtype)), torch.autograd.grad(wanted, wide, weights)
    assert found.dtype == dtype and found.shape == wanted.shape
    for one, other in zip((found, *ours), (wanted, *theirs), strict=True):
        assert (one.double() - other).norm() <= ERROR[dtype] * other.norm()


def test_without_tokens(on_gpu) -> None:
    """A rank without a document: the operations refuse an empty batch."""
    on_gpu(HOPPER)
    q = torch.zeros(0, 2, 16, dtype=BF16, requires_grad=True)
    assert attend(q, q, q, Documents.build(())).shape == (0, 2, 16)


def test_a_kernel_that_fails_or_is_wrong_is_said(on_gpu, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """Once, with dtype and error; documents are then computed one by one, right."""
    on_gpu(HOPPER)
    right = torch.ops.aten._flash_attention_forward
    given, documents = leaves(2, 1, 16, BF16), Documents.build(LENGTHS)
    wanted = attend(*given, documents)

    def broken(*_given: object, **_named: object) -> tuple:
        raise RuntimeError("no kernel image is available for execution on the device")

    def wrong(*given: object, **named: object) -> tuple:
        return (1.05 * right(*given, **named)[0],)

    for operation, said in ((broken, "RuntimeError: no kernel image is available"), (wrong, "its results are wrong")):
        fused_attention._tried.cache_clear()
        caplog.clear()
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", operation)
        with caplog.at_level(logging.WARNING):
            results = [attend(*given, documents) for _ in range(2)]
        assert len(caplog.records) == 1
        assert "flash attention does not work in torch.bfloat16 with heads of 16 on cpu" in caplog.text
        assert said in caplog.text
        for found in results:
            torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("fused", [Fused("flash", BF16, 16), Fused("flash", BF16, 24), Fused("efficient", BF16, 16),
                                   Fused("efficient", FP32, 16)])  # fmt: skip
def test_of_fake_tensors(fused: Fused, kv_heads: int) -> None:
    """The operations take what they are given, and keep what the memory plan expects.

    Flash repeats no key: beside it nothing is launched, if heads need no padding.
    """
    width = 20 if fused.width == 24 else 16
    with FakeTensorMode():
        given = leaves(4, kv_heads, width, BF16)
        documents = Documents.build(LENGTHS)
        documents.offsets  # noqa: B018  made once a batch
        kept: dict[int, Tensor] = {}
        keep = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(id(t), t), lambda t: t)
        with Operations() as calls, keep:
            out = fused_attention.attend(fused, *given, documents, None, None)
        if fused.kernel == "flash":  # torch's own fake gradient of the other one does not know its scale
            gradients = torch.autograd.grad(out, given, torch.ones_like(out))
            assert [(g.shape, g.dtype) for g in gradients] == [(t.shape, t.dtype) for t in given]
    assert (out.shape, out.dtype) == (given[0].shape, BF16)
    if fused == Fused("flash", BF16, 16):
        assert calls.names == ["_flash_attention_forward"]
    numbers = sum(t.nbytes for t in kept.values() if t.dim() > 2 or t.dtype == FP32)
    own = sum(t.nbytes for t in given)
    assert numbers == own + fused_attention.kept_bytes(fused, LENGTHS, 4, kv_heads, width, BF16)


class Gradients(TorchDispatchMode):
    """What attention's own gradient is given, by the names of its arguments; its results are zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[str, object] = {}

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        """Remember it."""
        if not func._schema.name.endswith("_attention_backward"):
            return func(*args, **(kwargs or {}))
        names = [argument.name for argument in func._schema.arguments]
        self.given = dict(zip(names, args, strict=False)) | (kwargs or {})
        found = [torch.zeros_like(self.given[name]) for name in ("query", "key", "value")]
        return (*found, None) if "efficient" in func._schema.name else tuple(found)


@pytest.mark.parametrize("kernel", ["flash", "efficient"])
@pytest.mark.parametrize("window", [None, 7])
def test_the_gradient_knows_window_and_scale(kernel: str, window: int | None) -> None:
    """Autograd passes on what the forward was given."""
    with FakeTensorMode(), Gradients() as seen:
        given = leaves(4, 4, 16, BF16)
        documents = Documents.build(LENGTHS)
        out = fused_attention.attend(Fused(kernel, BF16, 16), *given, documents, window, 0.3)
        torch.autograd.grad(out, given, torch.ones_like(out))
    assert seen.given["scale"] == 0.3
    if kernel == "flash":
        sizes = seen.given["window_size_left"], seen.given["window_size_right"]
        assert (*sizes, seen.given["is_causal"]) == ((-1, 0, True) if window is None else (6, 0, False))
    else:
        assert (seen.given.get("window_size"), seen.given["custom_mask_type"]) == (window, 1)
        assert seen.given["bias_requires_grad"] is False
    counts = ("max_q", "max_k") if kernel == "flash" else ("max_seqlen_q", "max_seqlen_k")
    assert [seen.given[name] for name in counts] == [30, 30]
