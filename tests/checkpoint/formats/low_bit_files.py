"""Writes the tiny model as GPTQ, AWQ and GreenBit would, by the rules of their files alone, with numpy.

Each writer returns the matrices as the files mean them (fp32, dequantized in float64), and their whole numbers by
channel. Numbers are rounded to the nearest, with a scale that a random factor makes no round one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Linear(NamedTuple):
    """w[n, channel] = q * scales - zeros by group; `order`: the channel of each column of `codes` [N, K]."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    group: np.ndarray
    order: np.ndarray

    def dequantized(self) -> np.ndarray:
        """[N, K] by channel."""
        packed = self.codes * self.scales[:, self.group].astype(float) - self.zeros[:, self.group]
        found = np.empty_like(packed)
        found[:, self.order] = packed
        return found.astype(np.float32)

    def by_channel(self) -> np.ndarray:
        """The whole numbers [N, K]."""
        found = np.empty_like(self.codes)
        found[:, self.order] = self.codes
        return found


class Written(NamedTuple):
    """A directory, its linears by name, and the channel scale of those that have one."""

    path: Path
    linears: dict[str, Linear]
    channel_scales: dict[str, np.ndarray]


def words(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Whole numbers [K, N], one bit after the other down each column -> int32 [K bits / 32, N]."""
    stream = ((numbers[:, None] >> np.arange(bits)[:, None]) & 1).reshape(-1, numbers.shape[1])
    octets = np.packbits(stream.astype(np.uint8), axis=0, bitorder="little").astype(np.uint32)
    four = octets.reshape(-1, 4, numbers.shape[1]) << np.array([0, 8, 16, 24], np.uint32)[:, None]
    return four.sum(1, dtype=np.uint32).view(np.int32)


def interleaved(numbers: np.ndarray) -> np.ndarray:
    """Whole numbers [X, N] of 4 bits -> AWQ's int32 [X, N / 8]."""
    found = np.zeros((len(numbers), numbers.shape[1] // 8), np.uint32)
    for place, output in enumerate(AWQ_ORDER):
        found |= numbers[:, output::8].astype(np.uint32) << np.uint32(4 * place)
    return found.view(np.int32)


def rounded(weight: np.ndarray, bits: int, group: np.ndarray, order: np.ndarray, whole_points: int | None, rng):
    """(Linear, points [N, G]) of a matrix; whole_points: the least zero point, or None for zeros of any value.

    With `whole_points` of half the range and more, the grid is symmetric around it; with 0, some points are 0.
    """
    top, packed = 2**bits - 1, weight[:, order]
    low = np.stack([packed[:, group == g].min(1) for g in range(group.max() + 1)], 1)
    high = np.stack([packed[:, group == g].max(1) for g in range(group.max() + 1)], 1)
    scales = ((high - low) / top * rng.uniform(0.9, 1.0, low.shape)).astype(np.float16)
    if whole_points is None:
        points, zeros = None, (-low).astype(np.float16).astype(float)
        codes = (packed + zeros[:, group]) / scales[:, group].astype(float)
    else:
        points = np.clip(np.rint(-low / scales.astype(float)), whole_points, top).astype(np.int64)
        if whole_points > top // 2:
            points[:] = whole_points
        if whole_points == 0:
            points[::5, 0] = 0
        zeros = points * scales.astype(float)
        codes = packed / scales[:, group].astype(float) + points[:, group]
    codes = np.clip(np.rint(codes), 0, top).astype(np.int64)
    return Linear(codes, scales, zeros, group, order), points


def _directory(base: Path, target: Path, tensors: dict[str, np.ndarray], config: dict) -> None:
    shutil.copytree(base, target)
    stated = json.loads((base / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(stated | config))
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, target / "model.safetensors")


def _write(base: Path, target: Path, pack: Callable, config: dict) -> Written:
    """pack: (key, weight, rng) -> (Linear, channel scale or None, tensors by suffix), or None to leave it plain."""
    rng = np.random.default_rng(0)
    tensors, linears, channel_scales = load_file(base / "model.safetensors"), {}, {}
    for key in [key for key in tensors if key.rsplit(".", 1)[0].endswith(LINEARS)]:
        name = key.removesuffix(".weight")
        linear, channel_scale, parts = pack(name, tensors[key], rng)
        del tensors[key]
        tensors |= {f"{name}.{part}": value for part, value in parts.items()}
        linears[name] = linear
        if channel_scale is not None:
            channel_scales[name] = channel_scale
    _directory(base, target, tensors, config)
    return Written(target, linears, channel_scales)


def write_dequantized(base: Path, written: Written, target: Path) -> Path:
    """The model that a packed directory means, plain and in fp32."""
    tensors = load_file(base / "model.safetensors")
    for name, linear in written.linears.items():
        tensors[f"{name}.weight"] = linear.dequantized() * written.channel_scales.get(name, np.float32(1))
    _directory(base, target, tensors, {})
    return target


def write_gptq(base: Path, target: Path, bits: int = 4, group: int = 32, *, sym: bool = False, act_order: bool = False,
               kind: str = "gptq", least: int = 1, **stated: object) -> Written:  # fmt: skip
    """group -1: a row's all. least: the least zero point of an asymmetric grid."""

    def pack(name: str, weight: np.ndarray, rng) -> tuple:
        size = weight.shape[1] if group == -1 else group
        columns = np.arange(weight.shape[1])
        order = rng.permutation(weight.shape[1]) if act_order else columns
        linear, points = rounded(weight, bits, columns // size, order, 2 ** (bits - 1) if sym else least, rng)
        index = np.empty(weight.shape[1], np.int32)
        index[order] = columns // size
        zeros = words(points, bits).T.copy()
        if kind == "gptq":  # 1 off each number of a word at once
            zeros = words((points - 1) % 2**bits, bits).T.copy()
            if bits != 3:
                zeros = words(points, bits).T.view(np.uint32) - words(np.ones_like(points), bits).T.view(np.uint32)
                zeros = zeros.view(np.int32)
        parts = {"qweight": words(linear.by_channel().T, bits), "qzeros": zeros,
                 "scales": linear.scales.T, "g_idx": index}  # fmt: skip
        return linear, None, parts

    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": sym, "desc_act": act_order}
    return _write(base, target, pack, {"quantization_config": config | {"checkpoint_format": kind} | stated})


def write_awq(base: Path, target: Path, group: int = 32, **stated: object) -> Written:
    """Asymmetric, as AutoAWQ writes by default."""

    def pack(name: str, weight: np.ndarray, rng) -> tuple:
        columns = np.arange(weight.shape[1])
        linear, points = rounded(weight, 4, columns // group, columns, 0, rng)
        parts = {"qweight": interleaved(linear.codes.T), "qzeros": interleaved(points.T), "scales": linear.scales.T}
        return linear, None, parts

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return _write(base, target, pack, {"quantization_config": config | stated})


def write_greenbit(base: Path, target: Path, plain: bool = False) -> Written:
    """Layer-mix: 4 bits for v and down, 2 for others; plain: without permutations and channel scales."""
    strategy: dict[str, dict] = {}

    def pack(name: str, weight: np.ndarray, rng) -> tuple:
        bits, group = (4, 128) if name.endswith(("v_proj", "down_proj")) else (2, 64)
        columns = np.arange(weight.shape[1])
        moved = not plain and not name.endswith("up_proj")
        order = rng.permutation(weight.shape[1]) if moved else columns
        scale = rng.uniform(0.5, 2, weight.shape[1]).astype(np.float16) if moved else None
        smooth = weight if scale is None else weight / scale.astype(float)
        linear, _ = rounded(smooth, bits, columns // group, order, None, rng)
        parts = {"qweight": words(linear.codes.T, bits), "scales": linear.scales.T, **_zeros(linear),
                 **_channels(order if moved else np.zeros_like(order), scale)}  # fmt: skip
        block, _, leaf = name.rpartition(".")
        said = {"group_size": {"4": 128, "2": 64}, "bits": [bits], "bits_prop": [1.0], "scale_bits": 4}
        strategy.setdefault(block.rpartition(".")[0], {})[leaf] = said
        return linear, scale, parts

    written = _write(base, target, pack, {})
    (target / "quant_strategy.json").write_text(json.dumps({"measurement": strategy}))
    return written


def _zeros(linear: Linear) -> dict[str, np.ndarray]:
    return {"zeros": linear.zeros.astype(np.float16).T}


def _channels(order: np.ndarray, scale: np.ndarray | None) -> dict[str, np.ndarray]:
    scale = np.ones(len(order), np.float16) if scale is None else scale
    return {"q_perm": order.astype(np.int16), "channel_scale": scale[None, None]}


def write_two_levels(base: Path, target: Path, bits: int = 2, group: int = 32, share: int = 32) -> Written:
    """GreenBit's earlier layout: 4-bit scales and zeros, which have statistics for each `share` outputs."""

    def pack(name: str, weight: np.ndarray, rng) -> tuple:
        columns = np.arange(weight.shape[1])
        first, _ = rounded(weight, bits, columns // group, columns, None, rng)
        parts, known = {}, {}
        for of, statistic in (("qscales", first.scales), ("qzeros", first.zeros)):
            by_share = statistic.T.astype(float).reshape(-1, len(weight) // share, share)
            low, high = by_share.min(-1, keepdims=True), by_share.max(-1, keepdims=True)
            scale = ((high - low) / 15).astype(np.float16)
            offset = (-low / scale).astype(np.float16)
            codes = np.clip(np.rint(by_share / scale + offset), 0, 15).astype(np.uint8)
            known[of] = ((codes.astype(np.float16) - offset) * scale).reshape(len(by_share), -1).T
            parts |= {f"{of}_zeros": offset, f"{of}_scales": scale, of: codes}
        parts["qstatistic"] = parts.pop("qscales") << 4 | parts.pop("qzeros")
        linear = first._replace(scales=known["qscales"], zeros=known["qzeros"])
        parts |= {"qweight": words(linear.codes.T, bits), "g_idx": (columns // group).astype(np.int32)}
        parts |= {"bias": np.zeros(len(weight), np.float16), "wf": np.arange(0, 32, bits, dtype=np.int32)[None]}
        return linear, None, parts

    return _write(base, target, pack, {})


def write_channel_mix(base: Path, target: Path, widths: tuple[int, ...] = (4, 3, 2)) -> Written:
    """GreenBit's channel-mix: the first groups of 32 are of the first width, and so on, the last of 64."""

    def pack(name: str, weight: np.ndarray, rng) -> tuple:
        columns = weight.shape[1]
        sizes = [32] * ((columns - 64) // 32) + [64]
        bits = [widths[min(i, len(widths) - 1)] for i in range(len(sizes))]
        group, order = np.repeat(np.arange(len(sizes)), sizes), rng.permutation(columns)
        scale = rng.uniform(0.5, 2, columns).astype(np.float16)
        linear, _ = rounded(weight / scale.astype(float), min(widths), group, order, None, rng)
        for g, width in enumerate(bits):  # some numbers that only the wider groups can hold
            more = rng.integers(0, 2**width, linear.codes[:, group == g].shape)
            linear.codes[:, group == g] = np.where(rng.random(more.shape) < 0.2, more, linear.codes[:, group == g])
        rows = [words(linear.codes[:, group == g].T, width) for g, width in enumerate(bits)]
        tops = np.cumsum([0, *(len(block) for block in rows[:-1])])
        q_groups = np.stack([bits, tops], 1).reshape(-1).astype(np.int16)
        parts = {"qweight": np.concatenate(rows), "scales": linear.scales.T, "q_groups": q_groups}
        parts |= _zeros(linear) | _channels(order, scale)
        return linear, scale, parts

    return _write(base, target, pack, {})
