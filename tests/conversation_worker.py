"""Run alone or under torchrun: rank 0 talks, the others follow; what was said goes to a file, as JSON."""

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from accessory.conversation import Conversation, dismiss, follow
from accessory.meta import MetaModel
from accessory.parallel import groups

base, target, ranks = sys.argv[1:]
layout = groups.start("cpu", int(ranks))
model = MetaModel.from_pretrained(base, dtype="fp32", max_seq_len=300, layout=layout)
if layout.is_main:
    one, two = Conversation(model), Conversation(model, "Be brief.")
    for talk, how in (
        (one, {}),
        (two, {"temperature": 1.0, "top_k": 9, "repetition_penalty": 1.2}),
        (one, {}),
        (two, {}),
    ):
        list(talk.ask("What is QST?", max_gen_len=9, **how))
    for _ in one.ask("Why?", max_gen_len=30):
        if len(one.history[-1].answer) > 3:
            break
    list(two.retry(max_gen_len=9, temperature=1.0, stop=[two.history[-1].answer[3]]))
    one.clear()
    list(one.ask("Again?", max_gen_len=9))
    for number in range(9):  # more than fits
        list(one.ask(f"Question {number}?", max_gen_len=9))
        if number % 3 == 1:
            one.undo()
    list(one.retry(max_gen_len=12))
    cut, again = one.history[-1].first, Conversation(model)
    again.history = one.history[:-1]
    list(again.ask(one.history[-1].question, max_gen_len=12))  # nothing is kept of it
    answers = [[turn.answer for turn in talk.history] for talk in (one, two, again)]
    Path(target).write_text(json.dumps({"answers": answers, "cut": cut}))
    dismiss()
else:
    follow(model)
groups.end_process()
