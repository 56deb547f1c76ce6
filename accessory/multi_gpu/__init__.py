"""A model cut over processes of its own, used from this one as if it were here; see docs/python.md."""

from __future__ import annotations

from accessory.multi_gpu.wrapper import MultiGpuWrapper

__all__ = ["MultiGpuWrapper"]
