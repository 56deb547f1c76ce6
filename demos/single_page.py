"""The page for single questions: fields for the question, perhaps an image, and settings; the answer beside them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import gradio
import torch.distributed as dist

from accessory.config import DemoConfig, ImageDemoConfig
from accessory.data.pictures import Picture
from accessory.data.templates import CHAT, PROMPT_LAYOUTS
from accessory.errors import ConfigError
from accessory.meta import MetaModel
from accessory.parallel.allocator import give_back_freed_memory
from demos.image_box import ImageBox
from demos.loading import sampling_of
from demos.page_serving import MAX_QUESTION, check_text, model_name, serve_page
from demos.sent_images import image_bytes, sendable
from demos.single_question import Question, answer, check_words
from demos.telling import told


def serve(model: MetaModel, config: DemoConfig) -> None:
    """Serve the page until interrupted."""
    one_at_a_time, closing = threading.Lock(), threading.Event()
    offered = tuple(name for name in PROMPT_LAYOUTS if name != CHAT or model.tokenizer.chat_template is not None)

    def see(image: object, transform: object) -> Picture | None:
        """The picture of what the page's box holds. Raises `AccessoryError` for what is none."""
        return model.picture(image_bytes(image), transform)

    def look(image: object, transform: object) -> str:
        """The square that the model sees, for the box."""
        with told():
            return sendable(see(image, transform))

    def respond(question, context, system_prompt, max_gen_len, temperature, top_p, *image) -> Iterator[str]:
        """The answer so far, as it grows, to what the page's fields hold."""
        with told():
            asked = checked_question(question, context, system_prompt, max_gen_len, temperature, top_p, config, offered)
            asked = replace(asked, picture=see(*image)) if image else asked
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

    serve_page(page_of(respond, look, config, offered), config)
    closing.set()
    # After an error, or while an answer is being given, the others are in a step, and end as it ends this rank.
    if dist.get_world_size() > 1 and one_at_a_time.acquire(timeout=10):
        dist.broadcast_object_list([None], src=0)


def page_of(
    respond: Callable[..., Iterator[str]], look: Callable[..., str], config: DemoConfig, offered: tuple[str, ...]
) -> gradio.Blocks:
    """The page as gradio's Blocks: an Interface would leave Stop standing after an answer that failed (gradio 6.31)."""

    def buttons(answering: bool) -> Callable[[], tuple]:
        """What shows the button that fits: Stop while a question is being answered, Ask otherwise."""
        return lambda: (gradio.Button(visible=not answering), gradio.Button(visible=answering))

    with gradio.Blocks(title="Accessory", analytics_enabled=False) as page:
        with gradio.Row():
            if isinstance(config, ImageDemoConfig):
                with gradio.Column(min_width=260):
                    box = ImageBox(config)
                box.on_look(look, lambda: "")
                seen = [box.image, box.transform]
            else:
                seen = []
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
                gradio.Dropdown(list(offered), value=config.system_prompt, label="Prompt layout"),
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
            respond, [question, context, *settings, *seen], shown,
            api_name="ask", preprocess=False, show_progress="hidden",
        )  # fmt: skip
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
        raise ConfigError(f"prompt layout is {system_prompt!r}; expected one of {', '.join(offered)}.")
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
