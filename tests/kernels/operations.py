"""Which of PyTorch's operations run."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """`names` of the operations that run inside it, in order, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Note the name, and have it done."""
        views = any(made.alias_info is not None and not made.alias_info.is_write for made in func._schema.returns)
        if not views and func.namespace != "prim":
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
