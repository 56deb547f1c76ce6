"""`MultiGpuWrapper`: starts the processes among which a model is divided, and speaks for all of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from functools import cached_property
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from accessory import errors
from accessory.errors import AccessoryError, ConfigError, LostRankError
from accessory.meta import Prompt
from accessory.meta.images import Image, encoded
from accessory.multi_gpu.messages import TOKENIZER, pack, unpack
from accessory.tokenizer import Tokenizer, open_tokenizer

_HOST = "127.0.0.1"
_GRACE = 10.0  # seconds that a process may take to end, or to fail as another one did
_STREAM_IS_OPEN = "A stream of stream_generate() is open: read it to its end, or close() it, before anything is asked."
Images = Image | Sequence[Image | None] | None


class MultiGpuWrapper:
    """A model divided over several GPUs of this machine (tensor parallel), used from one process, as upstream's.

    Its methods are those of `MetaModel`, which says what they take and give; tensors come to the CPU. `close`, or the
    end of a `with` block or of this process, ends the other processes. If one of them dies, `LostRankError` is raised
    and all end.
    """

    def __init__(
        self, *from_pretrained: Any, gpus: int | None = None, gpu_ids: Sequence[int] | None = None, **options: Any
    ) -> None:
        """Start a process for each GPU: the first `gpus`, or those numbered `gpu_ids`. The rest are arguments of
        `MetaModel.from_pretrained`; with device="cpu", `gpus` is a number of processes.

        Raises `ConfigError` for numbers that cannot be and under torchrun, and what `from_pretrained` raises.
        """
        places = _places(gpus, gpu_ids)
        if "RANK" in os.environ:
            raise ConfigError(
                "MultiGpuWrapper starts its own processes: leave out torchrun, or use MetaModel under it."
            )
        self._connections: list[Connection] = []
        self._processes: list[subprocess.Popen] = []
        self._streaming = False
        self._owing: list[Connection] = []
        request = pack(["from_pretrained", from_pretrained, options])
        shared = {"MASTER_ADDR": _HOST, "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(len(places))}
        tree = str(Path(__file__).resolve().parents[2])
        shared["PYTHONPATH"] = os.pathsep.join([tree, *filter(None, [os.environ.get("PYTHONPATH")])])
        shared["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // len(places), 1)))
        for rank, place in enumerate(places):
            here, there = Pipe()
            with there:
                environment = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(place)}
                command = [sys.executable, "-m", "accessory.multi_gpu.worker", str(there.fileno()), str(len(places))]
                self._processes.append(
                    subprocess.Popen(
                        command, env=environment, pass_fds=[there.fileno()], stdin=subprocess.DEVNULL,
                        start_new_session=True,  # Ctrl-C is for this process
                    )
                )  # fmt: skip
            self._connections.append(here)
        try:
            self._ask(request)
        except BaseException:
            self.close()
            raise

    def generate(self, prompts: Prompt | Sequence[Prompt], images: Images = None, **how: Any) -> str | list[str]:
        """See `MetaModel.generate`."""
        return self._call("generate", prompts, _sent(images), **how)

    def answers(self, prompt: Prompt, count: int, image: Image | None = None, **how: Any) -> list[str]:
        """See `MetaModel.answers`."""
        return self._call("answers", prompt, count, _sent(image), **how)

    def stream_generate(self, prompt: Prompt, image: Image | None = None, **how: Any) -> Generator[str, None, None]:
        """See `MetaModel.stream_generate`. Until the stream is read to its end or closed, nothing else can be asked."""
        if self._streaming:
            raise ConfigError(_STREAM_IS_OPEN)
        kind, piece = self._ask(pack(["stream_generate", [prompt, _sent(image)], how]))
        self._streaming = True
        try:
            while kind == "part":
                try:
                    yield piece
                except GeneratorExit:  # the reader wants no more
                    self._ask(pack(False))
                    raise
                kind, piece = self._ask(pack(True))
        finally:
            self._streaming = False

    def compute_logits(self, examples: Any, images: Images = None, **options: Any) -> Any:
        """See `MetaModel.compute_logits`."""
        return self._call("compute_logits", examples, _sent(images), **options)

    def evaluate_examples(
        self, examples: Any, contexts: Any = None, images: Images = None, **options: Any
    ) -> dict[str, Any]:
        """See `MetaModel.evaluate_examples`."""
        return self._call("evaluate_examples", examples, contexts, _sent(images), **options)

    def question(self, question: str, context: str = "", **how: Any) -> Prompt:
        """See `MetaModel.question`."""
        return self._call("question", question, context, **how)

    def use(self, part: Any, **options: Any) -> None:
        """See `MetaModel.use`."""
        self._call("use", part, **options)
        self.__dict__.pop("tokenizer", None)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, in this process."""
        with tempfile.TemporaryDirectory() as folder:
            for name, content in self._call(TOKENIZER).items():
                (Path(folder) / name).write_bytes(bytes.fromhex(content))
            return open_tokenizer(Path(folder))

    def close(self) -> None:
        """End the other processes; safe to call twice."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            try:
                process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._connections, self._processes, self._owing = [], [], []

    def __enter__(self) -> MultiGpuWrapper:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, name: str, *arguments: Any, **options: Any) -> Any:
        if self._streaming:
            raise ConfigError(_STREAM_IS_OPEN)
        return self._ask(pack([name, arguments, options]))[1]

    def _ask(self, request: bytes) -> tuple[str, Any]:
        """Give all processes the request; returns what the first one answers once all have.

        Raises what they raise, the first one's error first; where one fails alone, the others wait for it, and all end.
        """
        if not self._processes:
            raise ConfigError("The processes of this MultiGpuWrapper have ended; make another.")
        try:
            self._settle()
            for connection in self._connections:
                connection.send_bytes(request)
                self._owing.append(connection)
            answers = self._gathered()
        except (EOFError, OSError) as error:
            raise self._lost() from error
        for kind, *said in answers.values():
            if kind == "failed":
                raise getattr(errors, said[0], AccessoryError)(said[1])
        return tuple(answers[self._connections[0]])

    def _gathered(self) -> dict[Connection, list[Any]]:
        """The answers of all that owe one, as they come; where one fails alone, all processes are ended."""
        answers: dict[Connection, list[Any]] = {}
        while self._owing:
            failed = any(kind == "failed" for kind, *_ in answers.values())
            ready = wait(self._owing, _GRACE if failed else None)
            for connection in ready:
                answers[connection] = unpack(connection.recv_bytes())
                self._owing.remove(connection)
            if not ready:
                self._kill()
        return answers

    def _settle(self) -> None:
        """Take the answers to a call that was interrupted, and end a stream that was."""
        while owing := list(self._owing):
            if any(kind == "part" for kind, *_ in self._gathered().values()):
                for connection in owing:
                    connection.send_bytes(pack(False))
                    self._owing.append(connection)

    def _lost(self) -> LostRankError:
        """End all processes, since one has ended; the rest would wait for it."""
        for process in self._processes:
            try:
                process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
        ended = [f"rank {rank} with status {p.returncode}" for rank, p in enumerate(self._processes) if p.returncode]
        self._kill()
        return LostRankError(f"A process of MultiGpuWrapper has ended: {', '.join(ended) or 'for no known reason'}.")

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        self.close()


def _sent(images: Images) -> Path | bytes | list | None:
    """Images as they are handed to the processes. Raises `ConfigError` for what is none."""
    if isinstance(images, list | tuple):
        return [_sent(image) for image in images]
    return None if images is None else encoded(images)


def _places(gpus: int | None, gpu_ids: Sequence[int] | None) -> list[int]:
    """Numbers of the GPUs. Raises `ConfigError`."""
    if (gpus is None) == (gpu_ids is None):
        raise ConfigError(f"gpus is {gpus!r} and gpu_ids is {gpu_ids!r}; expected one of them.")
    places = list(range(gpus)) if isinstance(gpus, int) else list(gpu_ids if gpu_ids is not None else ())
    if not places or len(set(places)) < len(places) or not all(isinstance(p, int) and p >= 0 for p in places):
        raise ConfigError(f"gpus is {gpus!r}, gpu_ids is {gpu_ids!r}; expected a number of GPUs, or different ones.")
    return places


def _free_port() -> int:
    with socket.socket() as free:
        free.bind((_HOST, 0))
        return free.getsockname()[1]
