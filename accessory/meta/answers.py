"""Questions and answers: prompts as training laid them out, whole answers, and answers as they grow."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch

from accessory.data.pictures import Picture
from accessory.data.templates import CHAT, DialogPrompt, question_prompt
from accessory.errors import ConfigError
from accessory.generate import Embed, KeptCache, generate_tokens
from accessory.meta.images import TRANSFORM, Image, key_of, no_images, picture_of, with_rows
from accessory.meta.prompts import Prompt, check_prompts, check_text, end_marks, is_prompt
from accessory.meta.sampling import Sampling
from accessory.model.choice import Choice
from accessory.tokenizer import Chat
from accessory.vision import Vision

_HALF = "\N{REPLACEMENT CHARACTER}"  # what half a character is decoded to


class Answers:
    """Part of `MetaModel`.

    vision: the part that sees images, None of a model of text alone.
    """

    vision: Vision | None = None

    @property
    def prompt_layout(self) -> str:
        """The default layout of a question: that of most training documents; of a base its chat template, or alpaca."""
        own = "alpaca" if self.tokenizer.chat_template is None else CHAT
        return self.prompt_layouts[0] if self.prompt_layouts else own

    @cached_property
    def chat(self) -> Chat:
        """The chat template at work. Raises `TokenizerError` where the checkpoint has none, or one that is no Jinja."""
        return Chat(self.tokenizer)

    def question(
        self, question: str, context: str = "", prompt_layout: str | None = None, system: str | None = None
    ) -> Prompt:
        """The prompt of a question, and perhaps an input that belongs to it, as training lays it out; for `generate`.

        prompt_layout: one of `accessory.data.templates.PROMPT_LAYOUTS`; absent: `self.prompt_layout`. system: the words
        of the system, for the layouts chat and dialog; absent: `self.system`. Raises `ConfigError` for another layout,
        and for what is no text.
        """
        for name, value in (("question", question), ("context", context)):
            if not isinstance(value, str):
                raise ConfigError(f"{name} is {value!r}; expected a text.")
        layout = prompt_layout or self.prompt_layout
        return question_prompt(question, context, layout, self.system if system is None else system)

    def picture(self, image: Image | None, image_transform: str = TRANSFORM) -> Picture | None:
        """What this model's encoder is given of an image: a path, the bytes of a file, or an image of Pillow.

        image_transform: one of `accessory.data.pictures.TRANSFORMS`. The image is read here. Raises `ConfigError` for
        another transform, for what is no image, and for any where the model sees none; `DataError` for an image that
        cannot be read.
        """
        if self.vision is None:
            no_images(image)
            return None
        return picture_of(image, image_transform, self.vision.place)

    def _pictures(self, images: Any, count: int, image_transform: str) -> list[Picture | None]:
        """Those of `count` prompts. Raises `ConfigError` for other numbers of images, too."""
        if images is None:
            return [None] * count
        images = list(images) if isinstance(images, list | tuple) else [images]
        if len(images) != count:
            raise ConfigError(f"images are {len(images)}, and prompts {count}; expected one, or None, for each prompt.")
        return [self.picture(image, image_transform) for image in images]

    def prompt_tokens(self, prompt: Prompt, picture: Picture | None = None) -> list[int]:
        """Ids of a prompt as in training. If it is too long, its end is kept, with a warning.

        A text follows the tokenizer's start ids; messages are laid out by the checkpoint's chat template. A picture's
        rows stand where training has them, each as the same negative id, and are never cut.
        """
        rows = 0 if picture is None else self.vision.place.rows
        start = list(self.tokenizer.start_ids) if isinstance(prompt, str | DialogPrompt) else []
        tokens = self.whole_prompt_tokens(prompt)[len(start) :]
        room = max(self.max_seq_len - 1 - len(start) - rows, 1)
        if lost := len(tokens[:-room]):
            warnings.warn(
                f"The first {lost} tokens of a prompt are left out: max_seq_len is {self.max_seq_len}.", stacklevel=2
            )
        return self.with_rows(start + tokens[-room:], picture)

    def whole_prompt_tokens(self, prompt: Prompt, picture: Picture | None = None) -> list[int]:
        """The same, however long the prompt is. Raises `ConfigError` for what is no text."""
        check_text(prompt)
        if not isinstance(prompt, str | DialogPrompt):
            return self.with_rows(self.chat.ids(prompt), picture)
        first, *later = (prompt,) if isinstance(prompt, str) else prompt.pieces
        pieces = [self.tokenizer.encode(first), *self.tokenizer.encode_batch(later, continuation=True)]
        return self.with_rows([*self.tokenizer.start_ids, *(token for piece in pieces for token in piece)], picture)

    def with_rows(self, ids: list[int], picture: Picture | None) -> list[int]:
        """The ids of a prompt about a picture, if there is one: with its key for each of its rows."""
        return ids if picture is None else with_rows(ids, picture, self.vision.place, self.tokenizer.start_ids)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        images: Image | Sequence[Image | None] | None = None,
        *,
        image_transform: str = TRANSFORM,
        **sampling: Any,
    ) -> str | list[str]:
        """The answer to a prompt, or the answers to a list of them.

        images: what a prompt is about, or for each of a list an image or None; images and image_transform are as in
        `picture`. sampling: how answers are chosen, as `Sampling` says: `max_gen_len`, `temperature`, `top_p`, `stop`,
        ... Raises `ConfigError` for what is no prompt, and for values of `sampling` that cannot be, and what `picture`
        raises.
        """
        if is_prompt(prompts):
            return self.generate([prompts], images, image_transform=image_transform, **sampling)[0]
        check_prompts(prompts)
        how = Sampling.of(**sampling)
        return self._whole_answers(prompts, how, [how.seed], self._pictures(images, len(prompts), image_transform))

    def answers(
        self,
        prompt: Prompt,
        count: int,
        image: Image | None = None,
        *,
        image_transform: str = TRANSFORM,
        **sampling: Any,
    ) -> list[str]:
        """`count` answers to a prompt, which is computed once; `generate` would draw them by `seed`, `seed` + 1, ..."""
        check_prompts([prompt])
        how = Sampling.of(**sampling)
        if not isinstance(count, int) or count < 1:
            raise ConfigError(f"count is {count!r}; expected a number of answers, 1 or more.")
        seeds = [how.seed + number for number in range(count)]
        return self._whole_answers([prompt] * count, how, seeds, [self.picture(image, image_transform)] * count)

    def _whole_answers(
        self, prompts: Sequence[Prompt], how: Sampling, seeds: Sequence[int], pictures: Sequence[Picture | None]
    ) -> list[str]:
        ids = [self.prompt_tokens(prompt, picture) for prompt, picture in zip(prompts, pictures, strict=True)]
        dialog = [isinstance(prompt, DialogPrompt) for prompt in prompts]
        return self.whole_answers(ids, self.stop_ids(prompts), how, dialog, seeds, pictures)

    def whole_answers(
        self,
        ids: list[list[int]],
        stop_ids: frozenset[int],
        how: Sampling,
        dialog: Sequence[bool],
        seeds: Sequence[int] = (),
        pictures: Sequence[Picture | None] = (),
    ) -> list[str]:
        """The answers to prompts of `ids`, as `generate` gives them. dialog: which are in the layout of that name.

        seeds, pictures: as in `steps`.
        """
        answers: list[list[int]] = [[] for _ in ids]
        over: set[int] = set()
        for tokens in self.steps(ids, stop_ids, how, seeds, stopped=lambda: over, pictures=pictures):
            for number, token in enumerate(tokens):
                if token is not None:
                    answers[number].append(token)
                    marks = end_marks(dialog[number], how.stop)
                    if marks and self._text(dialog[number], answers[number], how.stop)[1]:
                        over.add(number)
            if len(over) == len(ids):
                break
        return [self._text(*pair, how.stop)[0] for pair in zip(dialog, answers, strict=True)]

    def stream_generate(
        self, prompt: Prompt, image: Image | None = None, *, image_transform: str = TRANSFORM, **sampling: Any
    ) -> Generator[str, None, None]:
        """The answer so far, each time it grows by a token; held back is what may yet change: half a character, or what
        the end of the turn or a text of `stop` begins with.

        image, image_transform, sampling: as in `generate`. The last answer is the same as `generate`'s, even if that
        ends in half a character.
        """
        check_prompts([prompt])
        how, picture = Sampling.of(**sampling), self.picture(image, image_transform)
        ids = self.prompt_tokens(prompt, picture)
        steps = self.steps([ids], self.stop_ids([prompt]), how, pictures=[picture])
        yield from self.texts(prompt, steps, how.stop)

    def texts(self, prompt: Prompt, steps: Iterator[list[int]], stop: tuple[str, ...] = ()) -> Iterator[str]:
        """The texts that `stream_generate` gives, of an answer to `prompt` whose tokens come in `steps`."""
        dialog = isinstance(prompt, DialogPrompt)
        marks = end_marks(dialog, stop)
        unfinished = (_HALF, *{mark[:length] for mark in marks for length in range(1, len(mark))})
        answer: list[int] = []
        shown = text = ""
        for (token,) in steps:
            answer.append(token)
            text, ended = self._text(dialog, answer, stop)
            if ended:
                break
            if not text.endswith(unfinished):
                shown = text
                yield text
        if text != shown:
            yield text

    def answer_text(self, answer: list[int], dialog: bool) -> str:
        """The words of an answer's tokens, without what ends it. dialog: whether it is in the layout of that name."""
        return self._text(dialog, answer, ())[0]

    def _text(self, dialog: bool, answer: list[int], stop: tuple[str, ...]) -> tuple[str, bool]:
        """(text of an answer so far, whether one of the marks that end it has come)."""
        text = self.tokenizer.decode(answer)
        ends = [end for mark in end_marks(dialog, stop) if (end := text.find(mark)) >= 0]
        words = text[: min(ends, default=None)]
        return words.removeprefix(" ") if dialog else words, bool(ends)

    def stop_ids(self, prompts: Sequence[Prompt]) -> frozenset[int]:
        """The ids that end an answer to any of `prompts`: the tokenizer's, and for messages the chat template's."""
        chats = not all(isinstance(prompt, str | DialogPrompt) for prompt in prompts)
        return self.chat.stop_ids if chats else self.tokenizer.stop_ids

    def steps(
        self,
        ids: list[list[int]],
        stop_ids: frozenset[int],
        how: Sampling,
        seeds: Sequence[int] = (),
        kept: KeptCache | None = None,
        stopped: Callable[[], Collection[int]] | None = None,
        pictures: Sequence[Picture | None] = (),
    ) -> Iterator[list[int | None]]:
        """The answers to prompts of `ids`, a token of each at a time, as `generate_tokens` gives them.

        seeds: one for the batch, or one for each prompt; absent: that of `how`. pictures: all whose rows stand in
        `ids`; where pictures have no rows, that of each prompt, or None.
        """
        stated, device = self.llma.args.stated_length, self.llma.frequencies.device
        if stated and min(max(map(len, ids), default=0) + how.max_gen_len, self.max_seq_len) > stated:
            warnings.warn(f"An answer may go beyond the {stated} tokens that the model was made for.", stacklevel=2)
        steps = generate_tokens(
            self.llma,
            ids,
            max_gen_len=how.max_gen_len,
            max_seq_len=self.max_seq_len,
            stop_ids=stop_ids,
            choice=Choice(*(getattr(how, name) for name in Choice._fields)),
            generators=[torch.Generator(device).manual_seed(seed) for seed in seeds or [how.seed]],
            kept=kept,
            stopped=stopped,
            embed=self._embed([picture for picture in pictures if picture is not None]),
            pictures=self._beside(pictures),
        )
        return self._without_dropout(steps) if self.training else steps

    def _embed(self, pictures: Sequence[Picture]) -> Embed | None:
        """What gives the rows of `pictures` by their keys; None where there are none."""
        named = {key_of(picture, self.vision.place): picture for picture in pictures}
        return (lambda keys: self.encoder([named[key] for key in keys])) if named else None

    def _beside(self, pictures: Sequence[Picture | None]) -> list[int | None]:
        """The key of each prompt's picture, where pictures have no rows and one is there."""
        if self.vision is None or self.vision.place.rows or not any(pictures):
            return []
        return [picture and key_of(picture, self.vision.place) for picture in pictures]

    def _without_dropout(self, steps: Iterator[list[int | None]]) -> Iterator[list[int | None]]:
        """`steps` of a model that is being trained, which goes on afterwards."""
        self.eval()
        try:
            yield from steps
        finally:
            self.train()
