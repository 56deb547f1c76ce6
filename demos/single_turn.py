"""Ask a model single questions, in the terminal (--prompt) or on a page served on this machine.

torchrun --nproc-per-node=RANKS demos/single_turn.py --pretrained_path BASE TRAINABLE --quant --prompt "..."
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from accessory.config import DemoConfig
from accessory.data.layouts import layout_note
from accessory.data.templates import CHAT
from accessory.entry import run_entry
from demos.loading import load, say_seed
from demos.single_question import answer_in_terminal, check_words, follow


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
        from demos.single_page import serve  # once it is known that gradio is there

        serve(model, config)
    else:
        follow(model)


if __name__ == "__main__":
    run_entry(DemoConfig, main)
