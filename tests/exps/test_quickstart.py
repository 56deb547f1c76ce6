"""The quickstart, on a tiny GGUF in place of the one it fetches; needs the environment that it makes itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parent.parent.parent

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "model.layers.": "blk.",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip


def write_gguf(base: Path, target: Path) -> None:
    """The tiny Hugging Face model as a GGUF with a byte-level vocabulary (row order does not matter here)."""
    config = json.loads((base / "config.json").read_text())
    vocabulary = json.loads((base / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(tokens) - 2))
    writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in vocabulary["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in load_file(base / "model.safetensors").items():
        for theirs, ours in GGUF_NAMES.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.skipif(
    Path(sys.prefix) != ROOT / ".venv", reason="runs in the .venv of tests/run.sh, or it would make one of its own"
)
def test_quickstart_and_its_second_start(tiny_base: Path, tmp_path: Path, shell) -> None:
    write_gguf(tiny_base, tmp_path / "tiny.gguf")
    command = f"bash {ROOT}/exps/quickstart.sh"
    settings = {"GGUF": str(tmp_path / "tiny.gguf"), "OUTPUT": str(tmp_path), "DEVICE": "cpu"}
    done = shell(command, cwd=tmp_path, **settings)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("Q: What is QST?") == 2
    assert "installing" not in done.stdout
    out = tmp_path / "quickstart"
    assert {"epoch3", "base", "log.jsonl", "loss.png", "output.log", "before.txt", "after.txt"} <= {
        path.name for path in out.iterdir()
    }
    assert list(out.glob("events.out.tfevents.*"))
    losses = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 1
    written = (out / "epoch3" / "trainable.safetensors").stat().st_mtime_ns
    again = shell(command, cwd=tmp_path, **settings)
    assert again.returncode == 0
    assert "fine-tuning" not in again.stdout
    assert (out / "after.txt").read_text() in again.stdout
    assert (out / "epoch3" / "trainable.safetensors").stat().st_mtime_ns == written
