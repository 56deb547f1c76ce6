"""A program that starts its own ranks."""

from __future__ import annotations

import json
from pathlib import Path

PROGRAM = """
import json, os, sys, time
sys.path[0] = {root!r}
from accessory.parallel import groups, own_ranks
from accessory.parallel.agree import highest
own_ranks._GRACE = 1.0
own_ranks.start_own_ranks([int(number) for number in sys.argv[2:]])
if sys.argv[1] == "fail" and os.environ["RANK"] == "1":
    sys.exit(3)
rank, world, local = groups.launch_environment()
layout = groups.start("cpu", world)
found = highest([rank, local, os.getpgid(0) == os.getpgid(os.getppid())])
if layout.is_main:
    print(json.dumps([rank, world, local, *found]))
groups.end_process()
"""


def program(directory: Path) -> Path:
    """A script that meets the ranks it has started."""
    path = directory / "program.py"
    path.write_text(PROGRAM.format(root=str(Path(__file__).resolve().parent.parent.parent)))
    return path


def test_ranks_are_started_with_the_same_command_line(python, tmp_path: Path) -> None:
    """Each on the GPU it was given, in a process group of its own; a single one, too, and none."""
    for numbers, found in (((), [0, 1, 0, 0, 0]), ((3,), [0, 1, 3, 0, 3]), ((0, 5), [0, 2, 0, 1, 5])):
        done = python(program(tmp_path), "meet", *map(str, numbers))
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)[:5] == found


def test_all_end_when_one_fails(python, tmp_path: Path) -> None:
    """Rank 0 would wait for rank 1 for longer than `python` waits for it."""
    done = python(program(tmp_path), "fail", "0", "1")
    assert done.returncode == -15 and "rank 1 (process " in done.stderr and "ended with status 3" in done.stderr


def test_refused_under_torchrun(torchrun, tmp_path: Path) -> None:
    done = torchrun(2, program(tmp_path), "meet", "0", "1")
    assert done.returncode != 0 and "leave them out under torchrun" in done.stderr
