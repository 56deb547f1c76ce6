"""What is run on every layout: each method on each storage. The table of docs/methods.md."""

from __future__ import annotations

from typing import NamedTuple

from accessory.method import METHODS
from accessory.quant import STORAGES
from tests.support import SupportTable

LAYOUTS = {
    "one": (1, []),
    "tp2": (2, ["--model_parallel_size", "2"]),
    "sdp2": (2, ["--data_parallel", "sdp"]),
    "fsdp2": (2, ["--data_parallel", "fsdp"]),
    "tp2_sdp2": (4, ["--model_parallel_size", "2", "--data_parallel", "sdp"]),
    "tp2_fsdp2": (4, ["--model_parallel_size", "2", "--data_parallel", "fsdp"]),
}
SETTINGS = {
    "peft": {"lora_rank": 4, "lora_alpha": 8},
    "adapter": {"prefix_layers": 1, "prefix_len": 3, "use_prefix_new_gate": True, "lora_rank": 4},
    "qst": {"r": 4, "side_heads": 2, "tail": 1, "tail_rank": 4, "label_share": 1},
}
"""Keys of --llama_config by method; others are run with their defaults."""
ALSO = {"nf4_single": ["--checkpointing"], "int8": ["--optim", "adamw8bit"]}
"""Flags that no other test tries on all layouts."""
GROUPS = ("int2_g64", "int3_g128")
"""Those of the storages in groups that are run; a cut over two ranks goes through the tiny model's groups of 128."""


class Job(NamedTuple):
    """A method on a base stored in one way; None is plain."""

    method: str
    storage: str | None

    @property
    def llama_type(self) -> str:
        """For a LLaMA."""
        return f"llama{METHODS[self.method].suffix}"

    @property
    def flags(self) -> list[str]:
        """Of a run."""
        packed = ["--quant", "--quant_type", self.storage, "--only_save_trainable"] if self.storage else []
        return ["--llama_type", self.llama_type, *packed, *ALSO.get(self.storage, [])]

    @property
    def cells(self) -> tuple[str, str]:
        """What a row of the table begins with."""
        also = f", with `{' '.join(ALSO[self.storage])}`" if self.storage in ALSO else ""
        return f"`{self.llama_type}`", f"`{self.storage}`{also}" if self.storage else "(plain)"

    @property
    def name(self) -> str:
        """Of a row, a test, a directory."""
        return f"{self.llama_type}-{self.storage or 'plain'}"


RUN = (None, *(name for name in STORAGES if name in GROUPS or not name.startswith(("int2", "int3", "int4"))))
JOBS = {job.name: job for job in (Job(method, storage) for method in METHODS for storage in RUN)}
ACROSS = {"full": (None,), "peft": RUN, "adapter": ("nf4",), "qst": ("nf4",), "qsft": GROUPS}
"""Storages with which each method goes over all layouts."""
SUPPORT = SupportTable(
    "methods.md",
    "support",
    ("`--llama_type`", "`--quant_type`"),
    {name: job.cells for name, job in JOBS.items()},
    tuple(f"`{layout}`" for layout in LAYOUTS),
)


def cells(every: bool) -> list[tuple[str, str]]:
    """(job, layout) of the table's cells: `every` one, or those that stand for all of them.

    These are every method on every storage in one process, every storage on every layout with one method, and every
    method on every layout with one storage.
    """
    return [
        (name, layout)
        for name, job in JOBS.items()
        for layout in LAYOUTS
        if every or layout == "one" or job.storage in ACROSS[job.method]
    ]
