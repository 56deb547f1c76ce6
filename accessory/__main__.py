"""`accessory COMMAND ...`, which pip installs, or `python -m accessory COMMAND ...`: a name for each of the scripts."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import accessory
from accessory.errors import ConfigError, nearest

ROOT = Path(accessory.__file__).resolve().parent.parent


class Command(NamedTuple):
    """A script, what it is for, and whether several processes may run it together."""

    script: str
    summary: str
    takes_ranks: bool = False


COMMANDS = {
    "finetune": Command("accessory/main_finetune.py", "train a base on your data", True),
    "pretrain": Command("accessory/main_pretrain.py", "train all weights on raw text", True),
    "ask": Command("demos/single_turn.py", "ask single questions, in the terminal or on a page", True),
    "chat": Command("demos/single_model_cli.py", "talk with a model in the terminal", True),
    "page": Command("demos/multi_turn.py", "talk with a model on a page", True),
    "ask-image": Command("demos/single_turn_mm.py", "ask single questions about images", True),
    "chat-image": Command("demos/multi_model_cli.py", "talk about an image in the terminal", True),
    "page-image": Command("demos/multi_turn_mm.py", "talk about an image on a page", True),
    "evaluate": Command("tools/evaluate.py", "zero-shot tasks and perplexity", True),
    "predict": Command("tools/predict.py", "answers to a data file's questions, beside those expected", True),
    "merge": Command("tools/merge.py", "put a trained part into its base"),
    "convert": Command("tools/convert.py", "write a checkpoint as another format"),
    "quantize": Command("tools/quantize.py", "pack a base once, so that later starts are quick"),
    "pack": Command("tools/pack_data.py", "tokenize raw text once, for pretraining"),
    "plan": Command("tools/plan.py", "the memory a run would take"),
    "inspect": Command("tools/inspect_checkpoint.py", "what a checkpoint is"),
}
_ELSEWHERE = {
    **dict.fromkeys(("train", "sft", "fit", "lora", "tune"), "finetune"),
    **dict.fromkeys(("infer", "inference", "generate"), "ask"),
    **dict.fromkeys(("eval", "test", "benchmark"), "evaluate"),
    **dict.fromkeys(("merge-lora", "merge_lora", "fuse"), "merge"),
    **dict.fromkeys(("export", "save"), "convert"),
}
"""What other trainers call these commands."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Become the process that a command line names; without a command, list them. Ends with status 2 if it cannot."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
    elif words[0] in ("-V", "--version"):
        print(accessory.__version__)
    else:
        try:
            line = command_line(*words)
        except ConfigError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            sys.exit(error.status)
        if words[0] == "finetune" and line[1].endswith(".py") and "RANK" not in os.environ:
            print("one process; --nproc N starts N of them, as torchrun --nproc-per-node=N does", file=sys.stderr)
        sys.stderr.flush()
        os.execv(line[0], line)  # not a child: signals and the exit status are then the script's own


def command_line(name: str, *rest: str) -> list[str]:
    """The Python command line of the command `name` with the words `rest`. Raises `ConfigError` where there is none."""
    if name not in COMMANDS:
        meant = _ELSEWHERE.get(name.lower())
        hint = f" Did you mean {meant!r}?" if meant else nearest(name, COMMANDS)
        raise ConfigError(f"accessory {name}: there is no such command.{hint} Known: {', '.join(COMMANDS)}.")
    command, (ranks, words) = COMMANDS[name], _without_ranks(list(rest))
    script = ROOT / command.script
    if not script.is_file():
        raise ConfigError(
            f"accessory {name}: runs {command.script} of Accessory's source tree, and {ROOT} is none. Install from a "
            "checkout of the repository: pip install -e CHECKOUT."
        )
    if ranks is None:
        return [sys.executable, str(script), *words]
    if not command.takes_ranks:
        raise ConfigError(f"accessory {name} --nproc: it runs in one process; leave it out.")
    if not ranks.isdecimal() or int(ranks) < 1:
        raise ConfigError(f"accessory {name} --nproc {ranks!r}: expected a number of processes, 1 or more.")
    if "RANK" in os.environ:
        raise ConfigError(f"accessory {name} --nproc {ranks}: a launcher has started this process already.")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*launcher, str(script), *words]


def _without_ranks(words: list[str]) -> tuple[str | None, list[str]]:
    """The value of --nproc among `words`, or None, and the words without it."""
    for place, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag == "--nproc":
            taken = 1 if equals else 2
            return value if equals else "".join(words[place + 1 : place + 2]), words[:place] + words[place + taken :]
    return None, words


def _help() -> str:
    width = max(map(len, COMMANDS))
    ranks = ", ".join(name for name, command in COMMANDS.items() if command.takes_ranks)
    return "\n".join(
        [
            "accessory COMMAND [--flag value ...]",
            "",
            *(f"  {name:{width}}  {command.summary} ({command.script})" for name, command in COMMANDS.items()),
            "",
            f"accessory COMMAND --help lists a command's flags. {ranks} take --nproc N: N processes",
            "on this machine. For several machines start the script in brackets with torchrun.",
        ]
    )


if __name__ == "__main__":
    main()
