"""The published QST code's files read: what its formulas compute of them is what must come out here."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from accessory.checkpoint.opening import open_source
from accessory.errors import CheckpointError
from tests.checkpoint.formats.published_side import (
    CONFIGS,
    FILES,
    FINAL_GATE,
    TOKENS,
    WIDTH,
    R,
    distance,
    family_of,
    ours,
    published,
    write_base,
)
from tests.method import side_reference


@pytest.fixture(scope="module")
def llama(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The LLaMA alone."""
    return write_base("llama", tmp_path_factory.mktemp("llama"), tiny_base)


def renamed(base: Path, part: Path, gate: Tensor) -> side_reference.Weights:
    """Base and part in float64 under the names of `side_reference`, by this test's own table."""
    shared = {"layers": "side", "q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "self_attn": "attention"}
    names = {
        "llama": {"o_proj": "wo", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3", "mlp": "feed_forward",
                  "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"},
        "opt": {"out_proj": "wo", "fc1": "feed_forward.w1", "fc2": "feed_forward.w2",
                "self_attn_layer_norm": "attention_norm", "final_layer_norm": "ffn_norm"},
    }[family_of(base)] | shared  # fmt: skip
    adapters = {"adapter_A": "a", "adapter_B": "b", "post_layer_norm": "norm_after", "pre_layer_norm": "norm_before"}
    found = {name: tensor.read() for name, tensor in open_source(base).tensors.items()}
    states = {kind: torch.load(part / file, weights_only=True) for kind, file in FILES.items()}
    for name, tensor in states["layers"].items():
        found["side." + ".".join(names.get(word, word) for word in name.split("."))] = tensor
    for name, tensor in states["downsample"].items():
        found["downsample." + ".".join(adapters.get(word, word) for word in name.split("."))] = tensor
    found |= {f"gates.{number}.weight": tensor for number, tensor in states["z"].items()}
    found |= {f"side_norm.{leaf}": tensor for leaf, tensor in states["norm"].items()}
    found |= {f"upsample.{leaf}": tensor for leaf, tensor in states["upsample"].items()}
    found["final_gate.weight"] = gate if family_of(base) == "llama" else -gate
    return {name: tensor.detach().double() for name, tensor in found.items()}


def composed(base: Path, part: Path, gate: Tensor, before: bool = False) -> Tensor:
    """Logits by the published formulas."""
    config, args = CONFIGS[family_of(base)](), open_source(base).settings
    narrow = args | {"dim": WIDTH // R, "n_layers": config.num_hidden_layers}
    settings = {"r": R, "start": "released", "downsample": "adapter", "tail": 0, "side_layers": 1,
                "embedding_downsample": "shared", "adapter_activation": "silu",
                "add_layer_norm_before_adapter": before, "add_layer_norm_after_adapter": True}  # fmt: skip
    weights, labelled = renamed(base, part, gate), torch.ones(len(TOKENS), dtype=torch.bool)
    return side_reference.logits(weights, TOKENS, labelled, args, narrow, settings)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("kind", ["parameter", "result", "half"])
def test_what_the_published_code_saved(kind: str, before: bool, base: Path, tmp_path: Path) -> None:
    """Its final gate is a parameter on a CPU, on a GPU the result of a move; both make the logits of the formulas."""
    values = torch.randn(WIDTH, generator=torch.Generator().manual_seed(4))
    if kind == "half":
        values = values.bfloat16()
    gate = nn.Parameter(values) if kind == "parameter" else nn.Parameter(values).view(-1)  # no leaf, as after `.to`
    part = published(base, tmp_path / "part", gate, before)
    source = open_source(part, open_source(base))
    assert (source.format, source.llama_type, source.is_delta) == ("QST", f"{family_of(base)}_qst", True)
    expected = composed(base, part, values.float(), before)
    assert distance(ours(base, part), expected) < 1e-5
    assert distance(ours(base), expected) > 0.05


def test_no_final_gate(base: Path, tmp_path: Path) -> None:
    """It is at its start, from which the published code does not move it on a GPU, and a training run says so."""
    part = published(base, tmp_path / "part")
    assert distance(ours(base, part), composed(base, part, torch.ones(WIDTH))) < 1e-5
    (note,) = open_source(part, open_source(base)).notes
    assert f"holds no {FINAL_GATE[family_of(base)]}" in note


def test_names_of_a_larger_model(base: Path, tmp_path: Path) -> None:
    """Names may begin with a module's, as those that a whole state dict is cut out of."""
    part = published(base, tmp_path / "part")
    expected = ours(base, part)
    prefixes = {"layers": "model.qst_layers.", "z": "module.model.z.", "downsample": "downsample.",
                "norm": "model.norm_qst.", "upsample": "upsample."}  # fmt: skip
    for kind, prefix in prefixes.items():
        state = torch.load(part / FILES[kind], weights_only=True)
        torch.save({prefix + name: tensor for name, tensor in state.items()}, part / FILES[kind])
    layers = torch.load(part / FILES["layers"], weights_only=True)
    torch.save(layers | {"0.self_attn.rotary_emb.inv_freq": torch.ones(2)}, part / FILES["layers"])
    assert torch.equal(ours(base, part), expected)


def test_among_the_files_of_a_trainer(base: Path, tmp_path: Path) -> None:
    """The published code's own checkpoints hold the base's files as well, which are not read."""
    part = published(base, tmp_path / "part")
    for file in (*base.glob("*.json"), *base.glob("*.safetensors")):
        shutil.copy(file, part)
    assert open_source(part, open_source(base)).format == "QST"


def change(part: Path, kind: str, **changes: Tensor | None) -> None:
    """Put tensors into a file, or take them out (None)."""
    state = torch.load(part / FILES[kind], weights_only=True) | changes
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, part / FILES[kind])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda p: (p / FILES["norm"]).unlink(), "qst_norm_parameters.pt is missing; found "),
        (lambda p: change(p, "layers", **{"1.mlp.fc9.weight": torch.ones(2)}), "1.mlp.fc9.weight in qst_layers_par"),
        (lambda p: change(p, "z", extra=torch.ones(2)), "extra in qst_z_parameters.pt is nothing that the published"),
        (lambda p: change(p, "norm", running_mean=torch.ones(2)), "running_mean in qst_norm_parameters.pt"),
        (lambda p: change(p, "z", **{"z.0": torch.ones(16)}), "holds gates.0.weight twice, once as z.0"),
        (lambda p: change(p, "z", **{"1": None}), "gates.1.weight is missing"),
        (lambda p: change(p, "z", **{"1": torch.ones(3)}), r"gates.1.weight has shape (3,), the model (16,)"),
        (lambda p: change(p, "downsample", **{"0.adapter_A.weight": None}), "downsample.0.a.weight here is missing"),
        (lambda p: change(p, "downsample", **{"0.adapter_B.weight": torch.ones(2)}), "downsample.0.b.weight here has"),
        (lambda p: torch.save({}, p / "qst_score_parameters.pt"), "qst_score_parameters.pt is of a classifier; only"),
        (lambda p: torch.save({"z": torch.ones(2)}, p / FINAL_GATE["llama"]), "holds a dict; expected one tensor"),
        (lambda p: (p / FINAL_GATE["llama"]).rename(p / FINAL_GATE["opt"]), "whose final gate is lm_head_z_path.pt"),
        (lambda p: (p / FILES["upsample"]).write_bytes(b"no"), "qst_upsample_parameters.pt: cannot be read as a "),
        (lambda p: torch.save(nn.Linear(2, 2), p / FILES["upsample"]), "hold more than tensors"),
    ],
)  # fmt: skip
def test_strange_files_are_refused(damage: Callable[[Path], None], said: str, tmp_path: Path, llama: Path) -> None:
    """File and name are said, whatever it is; nothing is unpickled."""
    part = published(llama, tmp_path / "part", torch.ones(WIDTH))
    damage(part)
    with pytest.raises(CheckpointError) as raised:
        ours(llama, part)
    assert str(part) in str(raised.value) and said in str(raised.value)


def test_another_base(tmp_path: Path, llama: Path, tiny_base: Path) -> None:
    """Family, width and blocks are compared; so is the MLP, which the code of October 2023 made r times narrower."""
    part = published(llama, tmp_path / "part", torch.ones(WIDTH))
    with pytest.raises(CheckpointError, match="is of a llama model with 3 blocks of 64 channels; the base is a ll"):
        ours(tiny_base, part)
    for i in range(3):
        names = [f"{i}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
        narrow = (torch.ones(4, 16), torch.ones(4, 16), torch.ones(16, 4))
        change(part, "layers", **dict(zip(names, narrow, strict=True)))
    with pytest.raises(CheckpointError, match=r"16 channels wide and their MLPs 4; no r makes both .* 64 and 98"):
        ours(llama, part)
    with pytest.raises(CheckpointError, match="give the base first: --pretrained_path BASE TRAINABLE"):
        ours(part)
