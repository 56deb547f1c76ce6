"""A model as EleutherAI's lm-eval harness asks one (extra `eval`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from accessory.eval.encoding import Encoding
from accessory.eval.ranks import over_ranks
from accessory.eval.scoring import Continuation, likelihoods
from accessory.meta import MetaModel, Sampling

MAX_GEN_TOKENS = 256  # of an answer, where a task states none: the harness's own default
PROMPTS_AT_ONCE = 16
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class HarnessModel(LM):
    """Answers the harness's three kinds of request. Ranks divide the work here: the harness sees one process."""

    def __init__(
        self, model: MetaModel, protocol: str = "0.4", tokens_at_once: int | None = None, shows: bool = False
    ) -> None:
        """tokens_at_once: of a micro-batch. shows: whether a bar on stderr tells how far it is."""
        super().__init__()
        self.model, self._encoding = model, Encoding(model.tokenizer, protocol)
        self._tokens_at_once, self._shows = tokens_at_once, shows

    @property
    def tokenizer_name(self) -> str:
        """What requests that the harness keeps are filed under."""
        return self.model.tokenizer.fingerprint

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """(sum of log p, whether greedy) of the continuation in each (context, continuation)."""
        return self._score(self._encoding.continuations([request.args for request in requests]))

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Sum of log p of each text's tokens, all of them, in windows of the model's length."""
        longest, windows, owners = self.model.max_seq_len, [], []
        for owner, request in enumerate(requests):
            ids = self._encoding.document(request.args[0])
            for pair in get_rolling_token_windows(ids, self._encoding.prefix, longest, 1):
                windows.append(Continuation(*make_disjoint_window(pair)))
                owners.append(owner)
        sums = [0.0] * len(requests)
        for owner, (log_p, _) in zip(owners, self._score(windows), strict=True):
            sums[owner] += log_p
        return sums

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """The answer to each (context, how to generate); requests that want the same are answered together."""
        alike: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[repr(sorted(request.args[1].items()))].append(number)
        answers, jobs = [""] * len(requests), []
        for numbers in alike.values():
            ids = {number: self._encoding.document(requests[number].args[0]) for number in numbers}
            ordered = sorted(numbers, key=lambda number: -len(ids[number]))
            how = requests[numbers[0]].args[1]
            for part in (ordered[at : at + PROMPTS_AT_ONCE] for at in range(0, len(ordered), PROMPTS_AT_ONCE)):
                jobs.append((part, [ids[number] for number in part], how))
        with tqdm(total=len(requests), desc="answering", disable=not self._shows) as bar:
            for (numbers, *_), found in zip(jobs, over_ranks(jobs, partial(self._answer, bar)), strict=True):
                for number, answer in zip(numbers, found, strict=True):
                    answers[number] = answer
        return answers

    def _score(self, continuations: Sequence[Continuation]) -> list[tuple[float, bool]]:
        with tqdm(total=len(continuations), desc="scoring", disable=not self._shows) as bar:
            return [tuple(found) for found in likelihoods(self.model, continuations, self._tokens_at_once, bar.update)]

    def _answer(self, bar: tqdm, job: tuple[list[int], list[list[int]], Mapping[str, Any]]) -> list[str]:
        numbers, prompts, wanted = job
        how, over = sampling(wanted), set()
        room = max(self.model.max_seq_len - how.max_gen_len, 1)
        ids, answers = [prompt[-room:] for prompt in prompts], [[] for _ in prompts]
        for step in self.model.steps(ids, self.model.tokenizer.stop_ids, how, stopped=lambda: over):
            for place, token in enumerate(step):
                if token is not None:
                    answers[place].append(token)
                    if how.stop and any(text in self.model.tokenizer.decode(answers[place]) for text in how.stop):
                        over.add(place)
            if len(over) == len(prompts):
                break
        bar.update(len(numbers))
        return [_before(self.model.tokenizer.decode(answer), how.stop) for answer in answers]


def sampling(wanted: Mapping[str, Any]) -> Sampling:
    """What a task's generation arguments ask for. Raises `ConfigError` for values that cannot be."""
    until = wanted.get("until") or ()
    length = next((wanted[name] for name in _LENGTHS if wanted.get(name) is not None), MAX_GEN_TOKENS)
    draws = wanted.get("do_sample") is not False
    chosen = {name: wanted[name] for name in ("top_k", "top_p", "min_p", "repetition_penalty") if name in wanted}
    return Sampling.of(
        max_gen_len=int(length),
        temperature=float(wanted.get("temperature") or 0) if draws else 0.0,
        stop=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
        **({"top_p": 1.0} | chosen),
    )


def _before(text: str, marks: Iterable[str]) -> str:
    """The text up to the first of the marks."""
    return text[: min((end for mark in marks if (end := text.find(mark)) >= 0), default=None)]
