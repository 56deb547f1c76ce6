"""Fine-tunes with the flags after the first argument, and writes there the memory after each step.

JSON, bytes: [resident, in use (handed out by the C library and not freed)]. A process of its own, so that nothing else
is measured.
"""

import ctypes
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from accessory.parallel.allocator import start_without_thread_caches

start_without_thread_caches()  # as main_finetune.py is

from accessory.config import FinetuneConfig, parse
from accessory.finetuning import finetune
from accessory.parallel import groups
from accessory.run.report import Reporter

PAGE = 4096


class Heap(ctypes.Structure):
    """glibc's struct mallinfo2, of malloc.h."""

    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Heap
report, memory = Reporter.step, []


def report_and_look(self, step):
    report(self, step)
    heap, resident = mallinfo2(), int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
    memory.append((resident, heap.uordblks + heap.hblkhd))


Reporter.step = report_and_look
finetune(parse(FinetuneConfig, sys.argv[2:]))
Path(sys.argv[1]).write_text(json.dumps(memory))
groups.end_process()
