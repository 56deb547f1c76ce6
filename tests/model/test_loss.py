"""The chunked cross-entropy against torch's, in value, gradient and memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from accessory.model import loss
from accessory.model.loss import CHUNK, GPU_CHUNK, _row_numbers, chunk_bytes, chunk_rows, cross_entropy_sum
from accessory.model.teaching import Lesson, Teaching

WIDTH, VOCABULARY, CPU = 16, 50, torch.device("cpu")


def problem(tokens: int, dtype: torch.dtype = torch.float64, ignore_every: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Random hidden [T, 16], head [50, 16] and labels [T], every third of them ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    head = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, VOCABULARY, (tokens,), generator=generator)
    if ignore_every:
        labels[::ignore_every] = -100
    return hidden, head, labels


def gradients(function, hidden: Tensor, head: Tensor, labels: Tensor) -> list[Tensor]:
    """Loss, and the gradients of 0.37 times the loss to hidden and head."""
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    loss = function(hidden, head, labels)
    (0.37 * loss).backward()
    return [loss.detach(), hidden.grad, head.grad]


def by_torch(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """The same sum with all logits at once."""
    return F.cross_entropy(hidden @ head.t(), labels, reduction="sum", ignore_index=-100)


@pytest.mark.filterwarnings("error")  # of PyTorch where what a product is written into has another shape
@pytest.mark.parametrize("supervised", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5])
def test_equals_torch_in_float64(supervised: int) -> None:
    """Around the borders of chunks, with ignored tokens in between."""
    hidden, head, labels = problem(supervised + 7, ignore_every=0)
    labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))[:7]] = -100
    found = gradients(cross_entropy_sum, hidden, head, labels)
    for one, other in zip(found, gradients(by_torch, hidden, head, labels), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert not found[1][labels < 0].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_labels_that_none_is_likelier_than_are_counted(dtype: torch.dtype) -> None:
    """Over chunks, or by their weights; the loss and its gradients are the same, bit for bit."""
    hidden, head, labels = problem(2 * CHUNK + 99, dtype)
    best = (hidden @ head.t()).argmax(1)
    labels[1::6] = best[1::6]  # of the others some are right by chance
    right, weights = best == labels, torch.rand(len(labels), generator=torch.Generator().manual_seed(4))
    hits = torch.full((2,), 7.0, dtype=torch.float64)
    counted = gradients(lambda *given: cross_entropy_sum(*given, hits=hits[0]), hidden, head, labels)
    cross_entropy_sum(hidden, head, labels, weights=weights, hits=hits[1])
    assert hits[0] == 7 + right.sum() and hits[1] == pytest.approx(7 + weights[right].double().sum().item(), rel=1e-6)
    assert all(map(torch.equal, counted, gradients(cross_entropy_sum, hidden, head, labels)))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 0.01)]
)
def test_weights(dtype: torch.dtype, tolerance: float) -> None:
    """Each summand and its gradients times its weight; weights of 1 change no bit."""
    hidden, head, labels = problem(700, dtype)
    weights = torch.rand(700, generator=torch.Generator().manual_seed(4))
    found = gradients(lambda *given: cross_entropy_sum(*given, weights=weights), hidden, head, labels)

    def weighted(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        each = F.cross_entropy(hidden @ head.t(), labels, reduction="none", ignore_index=-100)
        return (each * weights.double()).sum()

    for one, other in zip(found, gradients(weighted, hidden.double(), head.double(), labels), strict=True):
        assert (one.double() - other).norm() <= tolerance * other.norm()
    ones = gradients(lambda *given: cross_entropy_sum(*given, weights=torch.ones(700)), hidden, head, labels)
    assert all(map(torch.equal, ones[1:], gradients(cross_entropy_sum, hidden, head, labels)[1:]))


@pytest.mark.parametrize("kernels_wanted", ["0", "1"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01), (torch.float16, 0.002)]
)
def test_narrow_is_close_to_float64(
    switch_cpu_kernels: Callable[[bool], None], dtype: torch.dtype, tolerance: float, kernels_wanted: str
) -> None:
    """Each result within a part of its norm; the loss is fp32, gradients have the dtype of what they belong to."""
    switch_cpu_kernels(kernels_wanted == "1")
    hidden, head, labels = problem(700, dtype)
    found = gradients(cross_entropy_sum, hidden, head, labels)
    assert [t.dtype for t in found] == [torch.float32, dtype, dtype]
    for one, other in zip(found, gradients(by_torch, hidden.double(), head.double(), labels), strict=True):
        assert (one.double() - other).norm() <= tolerance * other.norm()


def test_fp32_master_head_under_bf16() -> None:
    """The head's gradient keeps its fp32."""
    hidden, head, labels = problem(700, torch.bfloat16)
    hidden, master = hidden.requires_grad_(), head.float().requires_grad_()
    cross_entropy_sum(hidden, master, labels).backward()
    assert (hidden.grad.dtype, master.grad.dtype) == (torch.bfloat16, torch.float32)
    wanted = gradients(by_torch, hidden.detach().double(), head.double(), labels)[2] / 0.37
    assert (master.grad.double() - wanted).norm() < 0.01 * wanted.norm()


def test_nothing_supervised() -> None:
    """Zero loss and zero gradients, as an idle rank's batch has them."""
    hidden, head, _ = problem(3, torch.float32)
    loss, dhidden, dhead = gradients(cross_entropy_sum, hidden, head, torch.full((3,), -100))
    assert loss == 0
    assert dhidden.shape == hidden.shape
    assert dhead.shape == head.shape
    assert not dhidden.any()
    assert not dhead.any()


def test_frozen_head_gets_no_gradient() -> None:
    """And costs none: the head alone, or hidden alone."""
    hidden, head, labels = problem(9)
    hidden.requires_grad_()
    loss = cross_entropy_sum(hidden, head, labels)
    assert [kept is None for kept in loss.grad_fn.saved_tensors] == [False, False, True, True]
    loss.backward()
    assert head.grad is None
    wanted = gradients(by_torch, hidden.detach(), head, labels)[1] / 0.37
    torch.testing.assert_close(hidden.grad, wanted)
    head.requires_grad_()
    loss = cross_entropy_sum(hidden.detach(), head, labels)
    assert [kept is None for kept in loss.grad_fn.saved_tensors] == [False, True, False, True]
    loss.backward()
    torch.testing.assert_close(head.grad, gradients(by_torch, hidden.detach(), head.detach(), labels)[2] / 0.37)


def test_huge_logits_do_not_overflow() -> None:
    """The highest score is taken off first."""
    hidden, head, labels = problem(20, torch.float32)
    loss = cross_entropy_sum(1000 * hidden, head, labels)
    torch.testing.assert_close(
        loss.double(), by_torch(1000 * hidden.double(), head.double(), labels), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 2.0**17), (torch.bfloat16, 1 / 3)])
def test_the_scale_of_the_loss_is_not_rounded(dtype: torch.dtype, scale: float) -> None:
    """A scale beyond fp16's range, and one that bf16 would change, reach each gradient with only its own rounding."""
    hidden, head, labels = problem(64, dtype)
    hidden = hidden.requires_grad_()
    (plain,) = torch.autograd.grad(cross_entropy_sum(hidden, head / 2**12, labels), hidden)
    (scaled,) = torch.autograd.grad(cross_entropy_sum(hidden, head / 2**12, labels) * scale, hidden)
    assert plain.any()
    assert torch.equal(scaled, (plain.double() * scale).to(dtype))


class Largest(TorchDispatchMode):
    """Remembers the most elements any tensor made under it had."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_logits_are_never_all_alive() -> None:
    """No tensor in forward or backward is larger than one chunk's logits."""
    hidden, head, labels = problem(2048, torch.float32, ignore_every=0)
    hidden, head = hidden.requires_grad_(), head.requires_grad_()
    with Largest() as largest:
        cross_entropy_sum(hidden, head, labels).backward()
    assert largest.numel == max(CHUNK * VOCABULARY, hidden.numel())
    assert largest.numel < len(labels) * VOCABULARY


class Logits(TorchDispatchMode):
    """Counts the bytes of the buffers with a column for each token of the vocabulary."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.new_empty.default and result.shape[1:] == (VOCABULARY,):
            self.bytes += result.nbytes
        return result


@pytest.mark.parametrize("kernels_wanted", ["0", "1"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_of_logits_are_known_before(
    switch_cpu_kernels: Callable[[bool], None], dtype: torch.dtype, kernels_wanted: str
) -> None:
    """Fewer than a chunk's and more; a GPU's have wide ones beside narrow ones, whatever this CPU can do."""
    switch_cpu_kernels(kernels_wanted == "1")
    for tokens in (7, CHUNK + 9):
        with Logits() as logits:
            cross_entropy_sum(*problem(tokens, dtype, ignore_every=0))
        assert chunk_bytes(tokens, VOCABULARY, CPU, dtype) == logits.bytes > 0
    wide = 50 * 4 if dtype == torch.bfloat16 else 0
    assert chunk_bytes(2000, 50, torch.device("cuda"), dtype) == GPU_CHUNK * (64 * dtype.itemsize + wide)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.bfloat16, 0.01)])
def test_padded_rows_of_the_head_take_no_part(dtype: torch.dtype, tolerance: float) -> None:
    """However large they are: the loss and all gradients are those of the rows before, and their own are zero."""
    hidden, head, labels = problem(40, dtype)
    padded = torch.cat([head, 100 * torch.ones(3, WIDTH, dtype=dtype)])
    found = gradients(lambda *given: cross_entropy_sum(*given, VOCABULARY), hidden, padded, labels)
    wanted = gradients(by_torch, hidden.double(), head.double(), labels)
    assert not found[2][VOCABULARY:].any()
    found[2] = found[2][:VOCABULARY]
    for one, other in zip(found, wanted, strict=True):
        assert (one.double() - other).norm() <= tolerance * other.norm()


def lesson(tokens: int, dtype: torch.dtype, weight: float, temperature: float, compared: int = VOCABULARY) -> Teaching:
    """Of a teacher that is wider than the student, and knows some tokens less, or none."""
    generator = torch.Generator().manual_seed(7)
    hidden, head = (torch.randn(rows, 24, generator=generator).to(dtype) for rows in (tokens, VOCABULARY))
    return Teaching(hidden, head, compared, weight, temperature, torch.zeros((), dtype=torch.float64))


@pytest.mark.parametrize(("share", "temperature", "compared"), [(0.5, 1, 50), (0.3, 2.5, 47), (1, 1, 50), (1, 4, 47)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-6), (torch.bfloat16, 0.01)]
)
def test_a_teacher(dtype: torch.dtype, tolerance: float, share: float, temperature: float, compared: int) -> None:
    """Loss and gradients over several chunks are those of the formula in fp64, weighted; cross-entropy is told, too."""
    hidden, head, labels = problem(2 * CHUNK + 99, dtype)
    weights = torch.rand(len(labels), generator=torch.Generator().manual_seed(4))
    given = lesson(len(labels), dtype, share, temperature, compared)
    entropy = torch.zeros((), dtype=torch.float64)

    def exactly(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        both = hidden @ head.t(), given.hidden.double() @ given.head.double().t()
        q, p = ((logits[:, :compared] / temperature).log_softmax(1) for logits in both)
        divergence = temperature**2 * F.kl_div(q, p, log_target=True, reduction="none").sum(1)
        each = F.cross_entropy(both[0], labels, reduction="none", ignore_index=-100)
        entropy.copy_((weights.double() * each).sum().detach())
        return (weights.double() * ((1 - share) * each + share * divergence))[labels >= 0].sum()

    found = gradients(lambda *it: cross_entropy_sum(*it, weights=weights, teaching=given), hidden, head, labels)
    wanted = gradients(exactly, hidden.double(), head.double(), labels)
    for one, other in zip(found, wanted, strict=True):
        assert (one.double() - other).norm() <= tolerance * other.norm()
    assert given.entropy.item() == pytest.approx(entropy.item(), rel=max(tolerance / 10, 1e-6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_teachers_logits_are_never_all_alive(dtype: torch.dtype) -> None:
    """Only a chunk's of either, whose bytes, and those of what is made of them, are known before."""
    hidden, head, labels = problem(1500, dtype, ignore_every=0)
    hidden, head = hidden.requires_grad_(), head.requires_grad_()
    with Largest() as largest:
        cross_entropy_sum(hidden, head, labels, teaching=lesson(1500, dtype, 0.5, 1)).backward()
    assert largest.numel == 3 * CHUNK * VOCABULARY < len(labels) * VOCABULARY
    bytes_of = [chunk_bytes(1500, VOCABULARY, CPU, dtype, taught) for taught in (False, True)]
    assert bytes_of[1] - bytes_of[0] == CHUNK * VOCABULARY * (dtype.itemsize + 3 * 4)


@pytest.mark.parametrize("taught", [False, True])
def test_logits_of_a_gpu_begin_at_aligned_places(monkeypatch: pytest.MonkeyPatch, taught: bool) -> None:
    """Rows that are wider than the head has rows, a teacher's too, change no digit of loss and gradients."""
    found, lessons = [], []

    class Noted(Lesson):
        """One that is noted."""

        def __init__(self, *given: object) -> None:
            super().__init__(*given)
            lessons.append(self)

    monkeypatch.setattr(loss, "Lesson", Noted)
    for numbers in (VOCABULARY, VOCABULARY + 64):
        monkeypatch.setattr(loss, "_row_numbers", lambda _rows, _device, numbers=numbers: numbers)
        hidden, head, labels = (t.requires_grad_(t.is_floating_point()) for t in problem(CHUNK + 9, torch.float32))
        given = lesson(CHUNK + 9, torch.float32, 0.5, 1) if taught else None
        total = cross_entropy_sum(hidden, head, labels, teaching=given)
        total.backward()
        found.append((total.detach(), hidden.grad, head.grad))
        assert not taught or lessons.pop().wanted.stride() == (numbers, 1)
        kept = [chunk_bytes(9, VOCABULARY, CPU, torch.float32, more) for more in (False, True)]
        assert kept[1] - kept[0] == 9 * 4 * (numbers + 3 * VOCABULARY)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert [_row_numbers(rows, torch.device("cuda")) for rows in (1, 64, 50_257)] == [64, 64, 50_304]
    assert _row_numbers(50_257, CPU) == 50_257 and chunk_rows(torch.device("cuda")) >= 1024


def test_tokens_that_are_known_to_have_labels() -> None:
    hidden, head, labels = problem(50, torch.float32)
    rows = (labels >= 0).nonzero()[:, 0]
    found = [cross_entropy_sum(hidden, head, labels, rows=known) for known in (None, rows, rows[:3])]
    assert found[0] == found[1] != found[2]
