"""`MetaModel` by the name of LLaMA2-Accessory's module."""

from accessory.meta import MetaModel

__all__ = ["MetaModel"]
