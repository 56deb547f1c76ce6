"""Data sets that are known by name: where they are published, and the files that they consist of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from accessory.data.readers import SUFFIXES
from accessory.errors import is_there


@dataclass(frozen=True)
class Published:
    """A published data set.

    what: its title and size, for a message. shape: that of its records, of `data/shapes.py`. hub: its name on the
    Hugging Face Hub. files: patterns of the files that have its training records, the first that matches counts; empty:
    all of its folder. fetch: what to fetch from the hub, empty for all of it. url: where to get it instead.
    """

    what: str
    shape: str
    hub: str = ""
    files: tuple[str, ...] = ()
    fetch: str = ""
    url: str = ""

    def remedy(self, name: str, data_dir: Path) -> str:
        """What to download, and where to put it."""
        if not self.hub or self.url:
            return f"download {self.url} into {data_dir / name}"
        what = f"{self.hub} {self.fetch}".rstrip()
        return f"hf download {what} --repo-type dataset --local-dir {data_dir / name}"


PUBLISHED: dict[str, Published] = {
    "alpaca": Published(
        "Stanford Alpaca, 52,002 records", "alpaca", "tatsu-lab/alpaca", ("alpaca_data.json", "data/train-*.parquet")
    ),
    "alpaca-clean": Published(
        "cleaned Alpaca, 51,760 records", "alpaca", "yahma/alpaca-cleaned", ("alpaca_data_cleaned.json",)
    ),
    "alpaca-gpt4": Published(
        "Alpaca's instructions answered by GPT-4, 52,002 records", "alpaca", "vicgalle/alpaca-gpt4",
        ("alpaca_gpt4_data.json", "data/train-*.parquet"),
    ),
    "evol-instruct": Published(
        "WizardLM's evolved instructions, 70,000 records", "alpaca", "WizardLMTeam/WizardLM_evol_instruct_70k",
        ("alpaca_evol_instruct_70k.json",),
    ),
    "oasst1": Published(
        "OpenAssistant's best replies, as Guanaco was trained on, 9,846 records", "oasst1",
        "timdettmers/openassistant-guanaco", ("openassistant_best_replies_train.jsonl",),
    ),
    "dolly": Published(
        "Databricks' Dolly, 15,011 records", "dolly", "databricks/databricks-dolly-15k",
        ("databricks-dolly-15k.jsonl",),
    ),
    "chip2": Published(
        "LAION's OIG, its part chip2, 210,289 records", "chip2", "laion/OIG", ("unified_chip2.jsonl",),
        "unified_chip2.jsonl",
    ),
    "self-instruct": Published(
        "Self-Instruct, 82,612 records", "prompt-completion", "yizhongw/self_instruct",
        ("gpt3_finetuning_data*.jsonl", "self_instruct/*train*.parquet"),
        url="https://raw.githubusercontent.com/yizhongw/self-instruct/main/data/finetuning/self_instruct_221203/"
        "gpt3_finetuning_data.jsonl",
    ),
    "hh-rlhf": Published(
        "Anthropic's helpful and harmless answers, 160,800 records", "hh-rlhf", "Anthropic/hh-rlhf",
        ("h*/train.jsonl.gz", "h*/train.jsonl"),
    ),
    "longform": Published("LongForm, 23,652 records", "input-output", "akoksal/LongForm"),
    "vicuna": Published(
        "conversations of ShareGPT, cleaned, 94,145 records", "sharegpt", "anon8231489123/ShareGPT_Vicuna_unfiltered",
        ("ShareGPT_V3_unfiltered_cleaned_split.json",), "ShareGPT_V3_unfiltered_cleaned_split.json",
    ),
    "belle": Published(
        "BELLE, 0.5 million records in Chinese", "alpaca", "BelleGroup/train_0.5M_CN", ("Belle_open_source_0.5M.json",)
    ),
    "belle-1m": Published(
        "BELLE, 1 million records in Chinese", "alpaca", "BelleGroup/train_1M_CN", ("Belle_open_source_1M.json",)
    ),
    "belle-2m": Published(
        "BELLE, 2 million records in Chinese", "alpaca", "BelleGroup/train_2M_CN", ("train_2M_CN.json",)
    ),
    "belle-multiturn": Published(
        "BELLE, 0.8 million conversations in Chinese", "belle", "BelleGroup/multiturn_chat_0.8M",
        ("multiturn_chat_0.8M.json",),
    ),
    "olcc": Published(
        "OL-CC, conversations of volunteers in Chinese", "olcc", files=("olcc_alpaca.json", "*OL-CC*", "*olcc*"),
        url="https://data.baai.ac.cn/details/OL-CC",
    ),
}  # fmt: skip
"""Name for `--data_config` and `path` -> data set."""


def published_name(given: str) -> str | None:
    """The name of the data set that is meant by a name, or by one of the hub with or without its owner; else None."""
    wanted = given.strip("/").lower()
    for name, data in PUBLISHED.items():
        hub = data.hub.lower()
        if wanted in (name, hub, hub.rpartition("/")[2]):
            return name
    return None


def published_files(name: str, data_dir: Path) -> list[Path]:
    """The files of a data set below `data_dir`, sorted; its folder alone where no pattern says which; empty if none.

    They may lie in `data_dir` itself, or in a folder called like the data set, or like its repository on the hub.
    A file called like the data set will do: `oasst1.json`.
    """
    data = PUBLISHED[name]
    folders = [data_dir / folder for folder in dict.fromkeys((name, data.hub.rpartition("/")[2], data.hub)) if folder]
    for pattern in data.files:
        for folder in (*folders, *([data_dir] if "/" not in pattern else [])):
            if found := sorted(path for path in folder.glob(pattern) if path.is_file()):
                return found
    own = (data_dir / f"{name}{suffix}{packed}" for suffix in SUFFIXES for packed in ("", ".gz"))
    return [path for path in (*own, *folders) if is_there(path)][:1]
