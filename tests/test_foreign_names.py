"""The answers to other trainers' names name flags and keys that we have."""

from __future__ import annotations

import re

import pytest

from accessory.config import DemoConfig, FinetuneConfig
from accessory.foreign_names import _SENTENCES, unknown
from accessory.meta import Sampling
from accessory.method.peft import Peft

FLAGS = [f"--{name}" for config in (FinetuneConfig, DemoConfig, Sampling) for name in config.model_fields]


def test_every_flag_and_key_that_is_named_is_there() -> None:
    for _, sentence in _SENTENCES:
        for flag in re.findall(r"--[a-z][a-z0-9_-]*", sentence):
            assert flag in [*FLAGS, "--nproc-per-node"], sentence
        for key in re.findall(r'"(\w+)"', sentence):
            assert key in Peft.Settings.model_fields, sentence


# Of published command lines: qlora's scripts, TRL's and LLaMA-Factory's examples, Axolotl's YAML, torchtune's recipes.
@pytest.mark.parametrize(("theirs", "ours"), [
    ("--model_name_or_path", "--pretrained_path"), ("--dataset", "--data_config"),
    ("--max_source_length", "--source_max_len"), ("--per_device_train_batch_size", "--batch_size"),
    ("--gradient_accumulation_steps", "--accum_iter"), ("--max_grad_norm", "--clip_grad"),
    ("--lora_r", "--llama_config"), ("--bits", "--quant"), ("--bf16", "--precision"),
    ("--lr_scheduler_type", "--lr_schedule"), ("--warmup_ratio", "--warmup_epochs"),
    ("--save_total_limit", "--keep_last"), ("--gradient_checkpointing", "--checkpointing"),
    ("--lora_target", "lora_targets"), ("--cutoff_len", "--max_words"), ("--finetuning_type", "--llama_type"),
    ("--num_train_epochs", "--epochs"), ("--base_model", "--pretrained_path"), ("--sequence_len", "--max_words"),
    ("--micro_batch_size", "--batch_size"), ("--load_in_4bit", "--quant"),
    ("--lora_modules_to_save", "vocabulary_tuning"), ("--resume_from_checkpoint", "--resume"),
    ("--deepspeed", "--data_parallel"), ("--enable_activation_checkpointing", "--checkpointing"),
    ("--optimizer", "--optim"), ("--warmup_iters", "--warmup_epochs"), ("--data_meta_path", "--data_config"),
    ("--save_freq", "--save_steps"), ("--gpu_ids", "--nproc-per-node"),
    ("--do_predict", "tools/predict.py"), ("--max_new_tokens", "--sample_tokens"), ("--top_p", "--sample_prompts"),
    ("--use_auth", "nothing is fetched"), ("--no_repeat_ngram_size", "nothing of the kind"),
])  # fmt: skip
def test_flags_of_published_commands(theirs: str, ours: str) -> None:
    assert ours in unknown(theirs, FLAGS, [f"--{name}" for name in FinetuneConfig.model_fields])


def test_the_demos_have_flags_of_their_own_for_how_they_answer() -> None:
    flags = [f"--{name}" for name in DemoConfig.model_fields]
    assert "--max_gen_len" in unknown("--max_new_tokens", FLAGS, flags)
    assert "--temperature" in unknown("--do_sample", FLAGS, flags)
