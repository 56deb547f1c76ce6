"""Fine-tuning of quantized large language models: `from accessory import MetaModel, finetune, FinetuneConfig`.

Letters of tensor shapes, here and in every room: B documents, S tokens of one document, T tokens of a packed
micro-batch, D model width, H attention heads, K key/value heads, E head width, F hidden width of the MLP, V vocabulary,
R rank of LoRA. A matrix W [N, K] has N outputs and K inputs.
"""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path

_HOMES = {
    "MetaModel": "accessory.meta.model",
    "finetune": "accessory.finetuning",
    "FinetuneConfig": "accessory.config.finetuning",
    "pretrain": "accessory.pretraining",
    "PretrainConfig": "accessory.config.pretraining",
    "Conversation": "accessory.conversation",
    "AccessoryError": "accessory.errors",
    "MultiGpuWrapper": "accessory.multi_gpu.wrapper",
}
"""The public names and where they are: loaded when first asked for, as they bring PyTorch along."""
__all__ = [
    "AccessoryError",
    "Conversation",
    "FinetuneConfig",
    "MetaModel",
    "MultiGpuWrapper",
    "PretrainConfig",
    "__version__",
    "finetune",
    "pretrain",
]

# On a CPU bitsandbytes complains at import that an optional kernel, which nothing here calls, is not installed.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str) -> object:
    """A public name, or the version: that of the source tree this lies in, else of what is installed."""
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])
    return getattr(importlib.import_module(_HOMES[name]), name)


def _version() -> str:
    import importlib.metadata
    import tomllib

    project = Path(__file__).resolve().parent.parent / "pyproject.toml"
    if project.is_file():
        return tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"]
    return importlib.metadata.version(__name__)


def __dir__() -> list[str]:
    """Public names too, before they are loaded: a notebook completes them, and errors suggest them."""
    return sorted({*globals(), *__all__})
