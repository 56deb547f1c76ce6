"""Run alone: reads all rows of a list of files once, and prints the tokens, and by how many bytes the process grew."""

import gc
import hashlib
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

from accessory.data.raw.documents import TextReader
from accessory.data.raw.files import read_meta
from accessory.data.raw.order import Shape, TextOrder
from accessory.data.raw.plan import plan_text
from accessory.data.raw.skipped import Skipped
from accessory.tokenizer import Tokenizer


class Fast(Tokenizer):
    """Bytes as they are, of which there are as many as a reader can be given."""

    vocab_size, bos_id, eos_id, start_ids, stop_ids = 258, 256, 257, (256,), frozenset((257,))
    fingerprint = hashlib.sha256(b"fast").hexdigest()

    def encode_batch(self, texts, *, continuation=False, threads=1):
        """UTF-8."""
        return [list(text.encode()) for text in texts]

    def decode(self, ids):
        """Not needed."""
        raise NotImplementedError

    def save(self, directory):
        """Not needed."""
        raise NotImplementedError


def resident() -> int:
    """Bytes of this process in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


gc.collect()
before, most, tokens = resident(), 0, 0
files, _ = read_meta(Path(sys.argv[1]), None, False)
plan = plan_text(files, TextReader(), Fast(), 64, 0)
order = TextOrder(plan, Fast(), Shape(2048, 4, 16), lambda values: values, window=1_000_000, threads=2,
                  skipped=Skipped(0, print))  # fmt: skip
for step in range(order.steps_per_epoch):
    tokens += sum(len(batch.tokens) for batch in order.micro_batches(0, step))
    most = max(most, resident())
print(tokens, most - before)
