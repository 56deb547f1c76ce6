"""Talk with a model in the terminal.

python demos/single_model_cli.py --pretrained_path BASE TRAINABLE --quant --n_gpus 2
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from accessory.config import ImageTerminalConfig, TerminalConfig
from accessory.conversation import Conversation, dismiss, follow
from accessory.data.layouts import layout_note
from accessory.entry import run_entry
from accessory.parallel.agree import together
from demos.loading import load, sampling_of, say_seed
from demos.page_serving import model_name
from demos.terminal import Terminal


def main(config: TerminalConfig) -> None:
    """Load the model, over as many model-parallel ranks as there are, and talk on the main one."""
    model, layout = load(config, page=False)
    sampling = sampling_of(config)
    sees = isinstance(config, ImageTerminalConfig)
    image = {"image": config.image, "image_transform": config.image_transform} if sees else {}
    talk = together(Conversation, model, config.system, prompt_layout=config.system_prompt, **image)
    if not layout.is_main:
        follow(model)
        return
    if note := layout_note(model.prompt_layouts, talk.prompt_layout):
        print(note, file=sys.stderr, flush=True)
    say_seed(config)
    terminal = Terminal(talk, sampling, config.image_transform if sees else None)
    if config.prompt:
        terminal.ask_all(config.prompt)
    else:
        print(f"{model_name(config.pretrained_path)}, prompt layout {talk.prompt_layout}. /help lists commands.")
        if not talk.remembers:
            print("Each question is asked alone: in this layout the model has learned single questions.")
        if sees and talk.picture is None:
            print("There is no image yet: /image FILE shows the model one.")
        terminal.run()
    dismiss()  # after an error the others may be in the middle of a step, and end as it ends this rank


if __name__ == "__main__":
    run_entry(TerminalConfig, main)
