"""One process of a `MultiGpuWrapper`: loads its share of the model, then does what it is told until its pipe is closed.

A request is [method, arguments, keyword arguments]; an answer is ["done", result], ["part", piece of a stream], after
which `True` asks for the next piece, or ["failed", name of the error, message].
"""

from __future__ import annotations

import sys
import tempfile
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from accessory.errors import AccessoryError
from accessory.meta import MetaModel
from accessory.multi_gpu.messages import TOKENIZER, pack, unpack
from accessory.parallel import groups


def serve(connection: Connection, ranks: int) -> None:
    """Answer requests, the first of which loads the model."""
    model: MetaModel | None = None
    while True:
        try:
            name, arguments, options = unpack(connection.recv_bytes())
        except EOFError:  # the other end is gone, and with it the need for this process
            return
        try:
            if model is None:
                layout = groups.start(str(options.pop("device", "auto")), model_parallel_size=ranks)
                model = MetaModel.from_pretrained(*arguments, layout=layout, **options)
                result = None
            else:
                result = _tokenizer_files(model) if name == TOKENIZER else getattr(model, name)(*arguments, **options)
                if isinstance(result, Iterator):
                    result = _stream(connection, result)
            answer = ["done", result]
        except AccessoryError as error:
            answer = ["failed", type(error).__name__, str(error)]
        except Exception:  # whatever it was, the process that asked must hear of it, or it would wait for ever
            answer = ["failed", "LostRankError", traceback.format_exc()]
        connection.send_bytes(pack(answer))


def _stream(connection: Connection, pieces: Iterator[Any]) -> None:
    """Send one piece after the other, as long as more are asked for."""
    for piece in pieces:
        connection.send_bytes(pack(["part", piece]))
        if not unpack(connection.recv_bytes()):
            pieces.close()
            return


def _tokenizer_files(model: MetaModel) -> dict[str, str]:
    """Name -> bytes, in hexadecimal digits, of the files that make the tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        model.tokenizer.save(Path(folder))
        return {path.name: path.read_bytes().hex() for path in Path(folder).iterdir()}


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), ranks=int(sys.argv[2]))
    groups.end_process()
