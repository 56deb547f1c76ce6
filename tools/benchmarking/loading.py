"""Loading a model, by us or by transformers and bitsandbytes, and watching the memory that it takes."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import torch

from accessory.meta import MetaModel

CPU = torch.device("cpu")


def load_ours(model: str, quant: bool, quant_type: str) -> MetaModel:
    """A model to be asked, on the CPU."""
    return MetaModel.from_pretrained(model, quant=quant, quant_type=quant_type if quant else None)


def load_peer(
    model: str, quant: bool, quant_type: str, dtype: torch.dtype = torch.bfloat16, device: torch.device = CPU
) -> torch.nn.Module:
    """The same directory by transformers, in `dtype` or, with bitsandbytes, in 4 bits multiplied in it."""
    import transformers

    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type.removesuffix("_single"),
        bnb_4bit_use_double_quant=not quant_type.endswith("_single"),
        bnb_4bit_compute_dtype=dtype,
    )
    kind = {"quantization_config": settings} if quant else {}
    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype, device_map={"": str(device)}, **kind)


class Watch:
    """Seconds that a stretch takes, and the most anonymous memory [bytes] it adds to the process, looked at often."""

    INTERVAL = 0.002  # seconds

    def __enter__(self) -> Watch:
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
