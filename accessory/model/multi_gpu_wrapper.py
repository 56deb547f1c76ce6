"""`MultiGpuWrapper` by the name of LLaMA2-Accessory's module."""

from accessory.multi_gpu import MultiGpuWrapper

__all__ = ["MultiGpuWrapper"]
