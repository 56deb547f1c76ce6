"""A conversation in the terminal: reads lines and commands, and shows answers as they come."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import ValidationError

from accessory.conversation import Conversation
from accessory.errors import AccessoryError, ConfigError, check_known, explain_validation
from accessory.meta import Sampling

_FENCE = '"""'
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # with them an answer could move the cursor, or worse
_HELP = f"""\
/help             these lines
/clear            forget what was said
/system [WORDS]   words before the first turn; without WORDS, show them; "-" for those of the prompt layout
/retry            answer the last question again
/undo             take back the last turn
/set [NAME VALUE] change how answers are chosen, or show it
/save FILE        write the conversation as JSON messages, a record to train on
/exit             leave, as Ctrl-D does

A question of several lines stands between {_FENCE} and {_FENCE}, or has a \\ at the end of each line but the last.
Ctrl-C ends an answer; what was said of it stays."""

_IMAGE_HELP = """\
/image [FILE]     begin a new conversation about an image; without FILE, about none
"""


class Terminal:
    """Answers questions that it is given, or reads from standard input until its end."""

    def __init__(self, talk: Conversation, sampling: Sampling, image_transform: str | None = None) -> None:
        """image_transform: how images are brought to the encoder's size; None where there may be none."""
        self.talk, self.sampling, self._image_transform = talk, sampling, image_transform
        self._commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: print(_HELP if image_transform is None else _IMAGE_HELP + _HELP),
            "clear": lambda _: talk.clear(),
            "system": self._system,
            "retry": self._retry,
            "undo": lambda _: print(f"Taken back: {printable(talk.undo())}"),
            "set": self._set,
            "save": self._save,
            "exit": lambda _: None,
        }
        if image_transform is not None:
            self._commands["image"] = self._image

    def run(self) -> None:
        """Answer until the input ends or /exit is read; errors are shown, and the conversation goes on."""
        with suppress(ImportError):  # where there is it, lines can be edited, and earlier ones come back
            import readline  # noqa: F401
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text are a fault of a question, not the end
        while (entry := self._read()) is not None:
            name, _, rest = entry.removeprefix("/").partition(" ")
            try:
                if not entry.startswith("/"):
                    self.show(self.talk.ask(entry, **dict(self.sampling)))
                    continue
                check_known("command", f"/{name}", [f"/{known}" for known in self._commands])
                if name == "exit":
                    return
                self._commands[name](rest.strip())
            except AccessoryError as error:
                print(f"{type(error).__name__}: {printable(str(error))}", flush=True)

    def ask_all(self, questions: list[str]) -> None:
        """Ask each, and print it before its answer. Raises what `Conversation.ask` does."""
        for question in questions:
            print(f"> {printable(question)}")
            self.show(self.talk.ask(question, **dict(self.sampling)))

    def show(self, answer: Iterator[str]) -> None:
        """Print an answer as it grows; Ctrl-C ends it."""
        shown = ""
        with _interrupt_calls(self.talk.stop):
            for text in answer:
                if not shown and self.talk.note:
                    print(f"({self.talk.note})")
                print(printable(text[len(shown) :]), end="", flush=True)
                shown = text
        ended = self.talk.history[-1].ended
        print({"length": "\n(cut off: /set max_gen_len)", "stopped": "\n(stopped)"}.get(ended, ""), flush=True)

    def _read(self) -> str | None:
        """A question or a command, of several lines perhaps; None at the end of the input."""
        entry, fenced = "", False
        while True:
            try:
                line = input(("... " if entry or fenced else "> ") if sys.stdin.isatty() else "")
            except EOFError:
                print(end="\n" if sys.stdin.isatty() else "")
                return None
            except KeyboardInterrupt:
                print("\n(Ctrl-D leaves)")
                entry, fenced = "", False
                continue
            if not entry and not fenced and line.strip().startswith(_FENCE):
                line, fenced = line.strip().removeprefix(_FENCE), True
            if fenced and line.rstrip().endswith(_FENCE):
                line, fenced = line.rstrip().removesuffix(_FENCE), False
                entry += line
            elif fenced:
                entry += line + "\n"
            elif line.endswith("\\"):
                entry += line[:-1] + "\n"
                continue
            else:
                entry += line
            if not fenced and entry.strip():
                return entry.strip()
            entry = entry if fenced else ""

    def _retry(self, _: str) -> None:
        self.show(self.talk.retry(**dict(self.sampling)))
        if self.sampling.temperature:
            print(f"(seed {self.sampling.seed + self.talk.history[-1].attempt})", flush=True)

    def _system(self, words: str) -> None:
        if words:
            self.talk.system = None if words == "-" else words
        elif self.talk.system is None:
            print("(those of the prompt layout)")
        else:
            print(printable(self.talk.system))

    def _image(self, name: str) -> None:
        self.talk.look_at(Path(name).expanduser() if name else None, self._image_transform)
        print("A new conversation" + (f" about {printable(name)}" if name else ", about no image"))

    def _set(self, words: str) -> None:
        if words:
            name, _, value = words.partition(" ")
            check_known("setting", name, Sampling.model_fields)
            changed = {name: value if name != "stop" else [value] if value else []}
            try:
                self.sampling = Sampling(**dict(self.sampling) | changed)
            except ValidationError as error:
                raise ConfigError(explain_validation(error, "/set", Sampling.model_fields)) from error
        else:
            print("\n".join(f"{name} {value}" for name, value in self.sampling))

    def _save(self, name: str) -> None:
        if not name:
            raise ConfigError("/save needs the name of a file.")
        records = self.talk.records
        if not records:
            raise ConfigError("Nothing has been said that could be saved.")
        try:
            place = Path(name).expanduser().absolute()
            for record in records:
                if "image" in record:  # where training looks for it
                    record["image"] = _seen_from(place.parent, Path(record["image"]).absolute())
            with place.open("x", encoding="utf-8") as file:
                file.write(json.dumps(records, ensure_ascii=False, indent=1))
        except OSError as error:
            raise ConfigError(f"{printable(name)}: cannot be written ({error.strerror}).") from error
        except (RuntimeError, ValueError) as error:  # the home of nobody; a name that no file can have
            raise ConfigError(f"{printable(name)}: cannot be written ({error}).") from error
        print(f"Written to {printable(name)}")


def _seen_from(folder: Path, file: Path) -> str:
    """The path of a file from a folder that it lies below; else as it is."""
    return str(file.relative_to(folder) if file.is_relative_to(folder) else file)


def printable(text: str) -> str:
    """Text that a terminal can be sent: without control characters but line ends and tabs, and such as it can spell."""
    shown = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
    spelled = sys.stdout.encoding or "utf-8"
    return shown.encode(spelled, errors="replace").decode(spelled)


@contextmanager
def _interrupt_calls(stop: Callable[[], None]) -> Iterator[None]:
    """Inside it Ctrl-C calls `stop`, which must not raise: other ranks may be in the middle of a step."""
    before = signal.signal(signal.SIGINT, lambda *_: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
