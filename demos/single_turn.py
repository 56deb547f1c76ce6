"""Ask a model single questions, in the terminal (--prompt) or on a page served on this machine.

torchrun --nproc-per-node=RANKS demos/single_turn.py --pretrained_path BASE TRAINABLE --quant --prompt "..."
"""

import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from accessory.config import DemoConfig
from accessory.data.templates import CHAT, PROMPT_LAYOUTS
from accessory.entry import run_entry
from accessory.errors import AccessoryError, ConfigError
from accessory.meta import MetaModel
from accessory.parallel import groups
from accessory.parallel.agree import on_main
from accessory.parallel.allocator import give_back_freed_memory
from demos.page_serving import check_place, model_name, serve_page

PATIENCE = timedelta(days=3650)  # the other ranks wait for the next question as long as the page is up
MAX_QUESTION = 20_000  # characters


@dataclass(frozen=True)
class Question:
    """One question and how to answer it, as every rank gets it."""

    question: str
    input: str = ""
    system_prompt: str = "alpaca"
    max_gen_len: int = 128
    temperature: float = 0.1
    top_p: float = 0.75
    seed: int = 0


def main(config: DemoConfig) -> None:
    """Load the model, over as many model-parallel ranks as were started, and answer."""
    ranks = groups.launch_environment(config.dist_on_itp)[1]
    layout = groups.start(config.device, ranks, config.dist_on_itp, PATIENCE)
    if not config.prompt:
        on_main(check_place, config)
    model = MetaModel.from_pretrained(
        list(config.pretrained_path),
        llama_type=config.llama_type,
        llama_config=config.llama_config,
        tokenizer_path=config.tokenizer_path,
        max_seq_len=config.max_seq_len,
        dtype=config.dtype,
        quant=config.quant,
        quant_type=config.quant_type,
        layout=layout,
    )
    config = config.model_copy(update={"system_prompt": config.system_prompt or model.prompt_layout})
    for prompt in config.prompt:
        check_words(prompt, config.system_prompt)
    if config.system_prompt == CHAT:
        _ = model.chat  # says what is missing before anybody asks
    if layout.is_main and (note := prompt_layout_note(model, config.system_prompt)):
        print(note, file=sys.stderr, flush=True)
    if config.prompt:
        answer_in_terminal(model, config, speaks=layout.is_main)
    elif layout.is_main:
        serve(model, config)
    else:
        follow(model)


def answer(model: MetaModel, question: Question) -> Generator[str, None, None]:
    """The answer so far, growing. Every rank must go through it together."""
    return model.stream_generate(
        model.question(question.question, question.input, question.system_prompt),
        max_gen_len=question.max_gen_len,
        temperature=question.temperature,
        top_p=question.top_p,
        seed=question.seed,
    )


def check_words(question: object, system_prompt: str) -> None:
    """Raise `ConfigError` for a question without words; the layout caption shows none."""
    if not isinstance(question, str) or not (question.strip() or system_prompt == "caption"):
        raise ConfigError("The question is empty.")


def prompt_layout_note(model: MetaModel, asked: str) -> str:
    """A note if a part was trained on several prompt layouts, or on others than `asked`; else the empty string."""
    trained = ", ".join(model.prompt_layouts)
    if model.prompt_layouts and asked not in model.prompt_layouts:
        return (
            f"--system_prompt {asked}: the part was trained on questions laid out as {trained}, and may answer worse."
        )
    if len(model.prompt_layouts) > 1:
        return f"The part was trained on questions laid out as {trained}; these are asked as {asked} (--system_prompt)."
    return ""


def answer_in_terminal(model: MetaModel, config: DemoConfig, speaks: bool) -> None:
    """Stream the answers to all --prompt questions."""
    for prompt in config.prompt:
        question = Question(
            prompt, "", config.system_prompt, config.max_gen_len, config.temperature, config.top_p, config.seed
        )
        shown = ""
        if speaks:
            print(f"Q: {prompt}\nA: ", end="", flush=True)
        for text in answer(model, question):
            if speaks:
                print(text[len(shown) :], end="", flush=True)
            shown = text
        if speaks:
            print("\n", flush=True)


def follow(model: MetaModel) -> None:
    """Answer along with the main rank until it sends no question."""
    while True:
        message: list[dict | None] = [None]
        dist.broadcast_object_list(message, src=0)
        if message[0] is None:
            return
        with suppress(ConfigError):  # the main rank raises the same and reports it
            for _ in answer(model, Question(**message[0])):
                pass


def serve(model: MetaModel, config: DemoConfig) -> None:
    """Serve the page until interrupted."""
    import gradio

    one_at_a_time = threading.Lock()
    offered = tuple(name for name in PROMPT_LAYOUTS if name != CHAT or model.tokenizer.chat_template is not None)

    def respond(question, context, system_prompt, max_gen_len, temperature, top_p) -> Iterator[str]:
        try:
            asked = checked_question(question, context, system_prompt, max_gen_len, temperature, top_p, config, offered)
            with one_at_a_time:
                if dist.get_world_size() > 1:
                    dist.broadcast_object_list([asdict(asked)], src=0)
                stream = answer(model, asked)
                try:
                    for text in stream:  # noqa: UP028 - `yield from` would close the stream along with this generator
                        yield text
                finally:
                    if dist.get_world_size() > 1:
                        for _ in stream:  # a reader who left early must not leave the other ranks in the middle of it
                            pass
                    stream.close()
                    give_back_freed_memory()  # the next one may be answered by another thread, in a heap of its own
        except AccessoryError as error:
            raise gradio.Error(str(error), duration=5, print_exception=False) from error

    page = page_of(respond, config, offered)
    try:
        serve_page(page, config)
    finally:
        if dist.get_world_size() > 1:
            dist.broadcast_object_list([None], src=0)


def page_of(respond: Callable[..., Iterator[str]], config: DemoConfig, offered: tuple[str, ...]):
    """The page as gradio's Blocks: an Interface would leave Stop standing after an answer that failed (gradio 6.31)."""
    import gradio

    def buttons(answering: bool) -> Callable[[], tuple]:
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
        # Unprocessed, so that `checked_question` alone says what is wrong with a value.
        answering = begun.then(respond, [question, context, *settings], shown, api_name="ask", preprocess=False)
        for ended in (answering.success, answering.failure):
            ended(buttons(False), **unlisted)
        stop.click(buttons(False), cancels=answering, **unlisted)
    return page


def checked_question(
    question, context, system_prompt, max_gen_len, temperature, top_p, config: DemoConfig, offered: tuple[str, ...]
) -> Question:
    """What came over the network, held to the limits the page shows. Raises `ConfigError`."""
    check_words(question, system_prompt)
    if len(question) + len(context or "") > MAX_QUESTION:
        raise ConfigError(f"A question has at most {MAX_QUESTION} characters, its input included.")
    if system_prompt not in offered or not isinstance(context or "", str):
        raise ConfigError(f"prompt template is {system_prompt!r}; expected one of {', '.join(offered)}; input is text.")
    try:
        (question + (context or "")).encode()
    except UnicodeEncodeError as error:
        raise ConfigError("The question holds half of a surrogate pair, which is no text.") from error
    numbers = {
        "max length": (max_gen_len, 1, config.max_seq_len),
        "temperature": (temperature, 0, 2),
        "top-p": (top_p, 0, 1),
    }
    for name, (value, low, high) in numbers.items():
        if not isinstance(value, (int, float)) or not low <= value <= high:
            raise ConfigError(f"{name} is {value!r}; expected {low} to {high}.")
    return Question(question, context or "", system_prompt, int(max_gen_len), temperature, top_p, config.seed)


if __name__ == "__main__":
    run_entry(DemoConfig, main)
