"""Measure training and loading:

    python tools/benchmark.py train --model DIR --data FILE --steps 10 --method lora --quant
    python tools/benchmark.py load --model DIR --quant      (and once more with --peer, for transformers + bitsandbytes)

Documents are taken in the file's order, so that another system can be given the same ones.
"""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import replace
from json import dumps
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import fire
import torch

from accessory.blueprint import draw_blueprint
from accessory.checkpoint.load import fill, resolve, targets
from accessory.checkpoint.opening import open_source
from accessory.checkpoint.training_state import Progress
from accessory.data.corpus import build_corpus
from accessory.data.order import GlobalOrder
from accessory.engine import Engine, Schedule
from accessory.entry import run_tool
from accessory.errors import ConfigError
from accessory.meta import MetaModel
from accessory.method.peft import Peft
from accessory.optim import LossScale, build_adamw
from accessory.parallel import groups
from accessory.parallel.data import DataParallel
from accessory.report import Reporter

METHODS = {
    "lora": {"norm_tuning": False, "bias_tuning": False},
    "normbias": {"norm_tuning": True, "bias_tuning": True, "lora_rank": -1},
    "normbiaslora": {"norm_tuning": True, "bias_tuning": True},
    "norm": {"norm_tuning": True, "bias_tuning": False, "lora_rank": -1},
}
UNTIMED_STEPS = 2


def train(
    model: str,
    data: str,
    steps: int = 10,
    batch_size: int = 8,
    method: str = "lora",
    rank: int = 16,
    quant: bool = False,
    quant_type: str = "nf4",
    max_words: int = 512,
    lr: float = 2e-4,
    checkpointing: bool = False,
    precision: str = "bf16",
    device: str = "auto",
    json: bool = False,
) -> None:
    """Train STEPS steps on the first STEPS x BATCH_SIZE records of DATA and print tokens/s, peak memory and losses."""
    if method not in METHODS:
        raise ConfigError(f"--method {method!r} is not one of {', '.join(METHODS)}.")
    if steps <= UNTIMED_STEPS:
        raise ConfigError(f"--steps {steps}: the first {UNTIMED_STEPS} are not timed, so more are needed.")
    layout = groups.start(device)
    engine = _engine(
        layout, Path(model), Path(data), {"lora_rank": rank, **METHODS[method]}, quant_type if quant else None,
        precision, batch_size, max_words, lr, checkpointing,
    )  # fmt: skip
    if steps > engine.schedule.steps_per_epoch:
        raise ConfigError(
            f"--steps {steps}: {data} is enough for {engine.schedule.steps_per_epoch} steps of {batch_size}."
        )
    engine.model.train()
    progress = Progress()
    reports = [engine.step(progress) for _ in range(steps)]
    timed = reports[UNTIMED_STEPS:]
    seconds, tokens = sum(r.seconds for r in timed), sum(r.tokens for r in timed)
    result = {
        "system": "accessory",
        "method": method,
        "device": layout.device.type,
        "steps": steps,
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "tokens_per_s": round(tokens / seconds, 1),
        "peak_bytes": reports[-1].peak_bytes,
        "trainable": sum(p.numel() for p in engine.parameters.values()),
        "losses": [round(r.loss, 4) for r in reports],
    }
    _show(result, json)
    groups.stop()


def _engine(layout, model, data, settings, quant_type, precision, batch_size, max_words, lr, checkpointing) -> Engine:
    source = open_source(model)
    blueprint = draw_blueprint(
        [source], llama_type="llama_peft", llama_config=[], tokenizer_path=None, quant_type=quant_type,
        precision=precision, train=True,
    )  # fmt: skip
    blueprint = replace(blueprint, method=Peft(Peft.Settings(**settings)))
    decoder, attachment = blueprint.build(layout)
    data_parallel = DataParallel(layout, "sdp", base_is_trained=False)
    fill(decoder, resolve(decoder, [source], attachment, initialize=True), attachment, layout, data_parallel)
    for block in decoder.layers:
        block.recompute = checkpointing
    parameters = {name: p for name, p in decoder.named_parameters() if name in attachment.trainable}
    corpus = build_corpus(data, blueprint.tokenizer, max_words=max_words)
    order = GlobalOrder(corpus, batch_size=batch_size, accum_iter=1, shuffle=False)
    return Engine(
        model=MetaModel(decoder, blueprint.tokenizer, max_words),
        parameters=parameters,
        slicings={target.name: target.slicing for target in targets(decoder)},
        optimizer=build_adamw(parameters, lr, weight_decay=0.0),
        order=order,
        schedule=Schedule(1, order.steps_per_epoch, 0.0, lr, lr, 2.0, 1, 1),
        data_parallel=data_parallel,
        layout=layout,
        reporter=Reporter(None, 0, 0, enabled=False),
        save=lambda *_: None,
        loss_scale=LossScale(precision == "fp16"),
    )


def load(model: str, quant: bool = False, quant_type: str = "nf4", peer: bool = False, json: bool = False) -> None:
    """Time how long MODEL takes to load, and how much memory beyond the loaded model that takes at its worst.

    Counted is memory of the process's own, not the pages of files mapped into it. With `peer` transformers and
    bitsandbytes load the same directory.
    """
    with _Watch() as watch:
        loaded = _load_peer(model, quant, quant_type) if peer else _load(model, quant, quant_type)
    held = {p.data_ptr(): p.nbytes for p in loaded.parameters()}
    matrices = [t for t in open_source(model).tensors.values() if len(t.shape) == 2]
    result = {
        "model": str(model),
        "quant": quant_type if quant else None,
        "loaded_by": "transformers" if peer else "accessory",
        "seconds": round(watch.seconds, 2),
        "model_bytes": sum(held.values()),
        "peak_bytes_above_model": watch.peak - sum(held.values()),
        "largest_matrix_bytes_in_16_bits": 2 * max(t.shape[0] * t.shape[1] for t in matrices),
    }
    _show(result, json)


def _load(model: str, quant: bool, quant_type: str) -> torch.nn.Module:
    return MetaModel.from_pretrained(model, quant=quant, quant_type=quant_type if quant else None)


def _load_peer(model: str, quant: bool, quant_type: str) -> torch.nn.Module:
    import transformers

    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type.removesuffix("_single"),
        bnb_4bit_use_double_quant=not quant_type.endswith("_single"),
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    kind = {"quantization_config": settings} if quant else {}
    return transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16, device_map={"": "cpu"}, **kind
    )


class _Watch:
    """Seconds that a stretch takes, and the most anonymous memory [bytes] it adds to the process, looked at often."""

    INTERVAL = 0.002  # seconds

    def __enter__(self) -> _Watch:
        self.peak, self._before, self._stop = 0, self._anonymous(), threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_exception) -> None:
        self.seconds = time.perf_counter() - self._began
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(self.INTERVAL):
            self.peak = max(self.peak, self._anonymous() - self._before)

    @staticmethod
    def _anonymous() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])


def _show(result: dict, as_json: bool) -> None:
    if as_json:
        print(dumps(result))
        return
    for name, value in result.items():
        print(f"{name:>14}  {value}")


if __name__ == "__main__":
    run_tool(lambda: fire.Fire({"train": train, "load": load}))
