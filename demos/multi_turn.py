"""Talk with a model on a page served on this machine; it remembers what was said, each visitor apart from the others.

torchrun --nproc-per-node=RANKS demos/multi_turn.py --pretrained_path BASE TRAINABLE --quant
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from accessory.config import ChatPageConfig
from accessory.conversation import dismiss, follow
from accessory.data.layouts import layout_note
from accessory.entry import run_entry
from demos.loading import load
from demos.page_serving import serve_page
from demos.talks import Talks


def main(config: ChatPageConfig) -> None:
    """Load the model, over as many model-parallel ranks as were started, and serve the page."""
    model, layout = load(config, page=True)
    talks = Talks(model, config)
    if not layout.is_main:
        follow(model)
        return
    from demos.chat_page import LOOKS, ChatPage  # once it is known that gradio is there

    if note := layout_note(model.prompt_layouts, talks.empty.prompt_layout):
        print(note, file=sys.stderr, flush=True)
    serve_page(ChatPage(talks, config, model).blocks, config, css=LOOKS)
    if talks.close():  # else, or after an error, the others are in the middle of a step, and end as it ends this rank
        dismiss()


if __name__ == "__main__":
    run_entry(ChatPageConfig, main)
