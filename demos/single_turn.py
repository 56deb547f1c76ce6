"""Ask a model single questions, in the terminal (--prompt) or on a page served on this machine.

torchrun --nproc-per-node=RANKS demos/single_turn.py --pretrained_path BASE TRAINABLE --quant --prompt "..."
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from accessory.config import DemoConfig
from accessory.data.layouts import layout_note
from accessory.data.templates import CHAT, PROMPT_LAYOUTS
from accessory.entry import run_entry
from accessory.errors import AccessoryError, ConfigError
from accessory.meta import MetaModel, Sampling
from accessory.parallel.allocator import give_back_freed_memory
from demos.loading import load, sampling_of, say_seed
from demos.page_serving import MAX_QUESTION, check_text, model_name, serve_page
from demos.terminal import printable


@dataclass(frozen=True)
class Question:
    """One question and how to answer it, as every rank gets it."""

    question: str
    input: str
    system_prompt: str
    how: Sampling


def main(config: DemoConfig) -> None:
    """Load the model, over as many model-parallel ranks as were started, and answer."""
    model, layout = load(config, page=not config.prompt)
    config = config.model_copy(update={"system_prompt": config.system_prompt or model.prompt_layout})
    for prompt in config.prompt:
        check_words(prompt, config.system_prompt)
    if config.system_prompt == CHAT:
        _ = model.chat  # says what is missing before anybody asks
    if layout.is_main and (note := layout_note(model.prompt_layouts, config.system_prompt)):
        print(note, file=sys.stderr, flush=True)
    if config.prompt:
        if layout.is_main:
            say_seed(config)
        answer_in_terminal(model, config, speaks=layout.is_main)
    elif layout.is_main:
        serve(model, config)
    else:
        follow(model)


def answer(model: MetaModel, question: Question, stopped: Callable[[], bool] | None = None) -> Iterator[str]:
    """The answer so far, growing. Every rank must go through it together; `stopped` ends it, from the main one.

    Raises `ConfigError` for a question that is too long or no text.
    """
    prompt = model.question(question.question, question.input, question.system_prompt)
    ids = model.whole_prompt_tokens(prompt)
    if len(ids) >= model.max_seq_len:
        raise ConfigError(
            f"The question has {len(ids)} tokens; expected less than {model.max_seq_len} (--max_seq_len)."
        )
    ended = (lambda: {0} if stopped() else ()) if stopped else None
    steps = model.steps([ids], model.stop_ids([prompt]), question.how, stopped=ended)
    return model.texts(prompt, steps, question.how.stop)


def check_words(question: object, system_prompt: str) -> None:
    """Raise `ConfigError` for a question without words; the layout caption shows none."""
    if not isinstance(question, str) or not (question.strip() or system_prompt == "caption"):
        raise ConfigError("The question is empty.")


def answer_in_terminal(model: MetaModel, config: DemoConfig, speaks: bool) -> None:
    """Stream the answers to all --prompt questions."""
    for prompt in config.prompt:
        question = Question(prompt, "", config.system_prompt, sampling_of(config))
        shown = ""
        if speaks:
            print(f"Q: {printable(prompt)}\nA: ", end="", flush=True)
        for text in answer(model, question):
            if speaks:
                print(printable(text[len(shown) :]), end="", flush=True)
            shown = text
        if speaks:
            print("\n", flush=True)


def follow(model: MetaModel) -> None:
    """Answer along with the main rank until it sends no question."""
    while True:
        message: list[Question | None] = [None]
        dist.broadcast_object_list(message, src=0)
        if message[0] is None:
            return
        with suppress(ConfigError):  # the main rank raises the same and reports it
            for _ in answer(model, message[0]):
                pass


def serve(model: MetaModel, config: DemoConfig) -> None:
    """Serve the page until interrupted."""
    import gradio

    one_at_a_time, closing = threading.Lock(), threading.Event()
    offered = tuple(name for name in PROMPT_LAYOUTS if name != CHAT or model.tokenizer.chat_template is not None)

    def respond(question, context, system_prompt, max_gen_len, temperature, top_p) -> Iterator[str]:
        """The answer so far, as it grows, to what the page's fields hold."""
        try:
            asked = checked_question(question, context, system_prompt, max_gen_len, temperature, top_p, config, offered)
            with one_at_a_time:
                if dist.get_world_size() > 1:
                    dist.broadcast_object_list([asked], src=0)
                left = threading.Event()
                stream = answer(model, asked, lambda: left.is_set() or closing.is_set())
                try:
                    for text in stream:  # noqa: UP028 - `yield from` would close the stream along with this generator
                        yield text
                finally:
                    left.set()
                    for _ in stream:  # a reader who left early must not leave the other ranks in the middle of it
                        pass
                    give_back_freed_memory()  # the next one may be answered by another thread, in a heap of its own
        except AccessoryError as error:
            raise gradio.Error(str(error), duration=5, print_exception=False) from error

    serve_page(page_of(respond, config, offered), config)
    closing.set()
    # After an error, or while an answer is being given, the others are in a step, and end as it ends this rank.
    if dist.get_world_size() > 1 and one_at_a_time.acquire(timeout=10):
        dist.broadcast_object_list([None], src=0)


def page_of(respond: Callable[..., Iterator[str]], config: DemoConfig, offered: tuple[str, ...]):
    """The page as gradio's Blocks: an Interface would leave Stop standing after an answer that failed (gradio 6.31)."""
    import gradio

    def buttons(answering: bool) -> Callable[[], tuple]:
        """What shows the button that fits: Stop while a question is being answered, Ask otherwise."""
        return lambda: (gradio.Button(visible=not answering), gradio.Button(visible=answering))

    with gradio.Blocks(title="Accessory", analytics_enabled=False) as page:
        with gradio.Row():
            with gradio.Column():
                # Of several rows, so that Enter begins a line and Shift+Enter asks.
                question, context = (
                    gradio.Textbox(label=label, lines=lines, max_length=MAX_QUESTION, placeholder=hint)
                    for label, lines, hint in (("Question", 4, "Shift+Enter asks"), ("Input", 2, "a text it is about"))
                )
                ask = gradio.Button("Ask", variant="primary")
                stop = gradio.Button("Stop", variant="stop", visible=False)
            shown = gradio.Textbox(label=f"Answer of {model_name(config.pretrained_path)}", lines=11, max_lines=30)
        with gradio.Row():
            settings = [
                gradio.Dropdown(list(offered), value=config.system_prompt, label="Prompt template"),
                gradio.Slider(
                    1, config.max_seq_len, value=config.max_gen_len, step=1, label="Max tokens", min_width=220
                ),
                gradio.Slider(0, 2, value=config.temperature, step=0.01, label="Temperature", min_width=220),
                gradio.Slider(0.01, 1, value=config.top_p, step=0.01, label="Top-p", min_width=220),
            ]
        unlisted = {"outputs": [ask, stop], "queue": False, "api_visibility": "undocumented"}
        begun = gradio.on([ask.click, question.submit, context.submit], buttons(True), **unlisted)
        # Unprocessed, so that `checked_question` alone says what is wrong with a value. Without gradio's progress: it
        # covers the answer with "Error" when a question is refused, and again when a later one is stopped.
        answering = begun.then(
            respond, [question, context, *settings], shown, api_name="ask", preprocess=False, show_progress="hidden"
        )
        for ended in (answering.success, answering.failure):
            ended(buttons(False), **unlisted)
        stop.click(buttons(False), cancels=answering, **unlisted)
    return page


def checked_question(
    question, context, system_prompt, max_gen_len, temperature, top_p, config: DemoConfig, offered: tuple[str, ...]
) -> Question:
    """What came over the network, held to the limits the page shows. Raises `ConfigError`."""
    check_words(question, system_prompt)
    for name, text in (("The question", question), ("The input", context or "")):
        check_text(name, text)
    if system_prompt not in offered:
        raise ConfigError(f"prompt template is {system_prompt!r}; expected one of {', '.join(offered)}.")
    numbers = {
        "max length": (max_gen_len, 1, config.max_seq_len),
        "temperature": (temperature, 0, 2),
        "top-p": (top_p, 0, 1),
    }
    for name, (value, low, high) in numbers.items():
        if not isinstance(value, (int, float)) or not low <= value <= high:
            raise ConfigError(f"{name} is {value!r}; expected {low} to {high}.")
    how = sampling_of(config, max_gen_len=int(max_gen_len), temperature=temperature, top_p=top_p)
    return Question(question, context or "", system_prompt, how)


if __name__ == "__main__":
    run_entry(DemoConfig, main)
