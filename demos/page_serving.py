"""Serves a demo's page, behind its guard, until it is interrupted."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accessory.config import ImageConfig, PageConfig
from accessory.errors import ConfigError
from demos.sent_images import MOST_IMAGE_REQUEST
from demos.visits import MOST_VISITS

if TYPE_CHECKING:
    from gradio import Blocks

MAX_WAITING = 16  # questions in the queue
MAX_QUESTION = 20_000  # characters


def check_place(config: PageConfig) -> None:
    """Raise `ConfigError` where no page could be served, before the minutes that loading may take."""
    if find_spec("gradio") is None:
        raise ConfigError("The page needs gradio: pip install -e '.[demo]'. Or ask with --prompt.")
    try:
        with socket.socket() as place:
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            place.bind((config.host, config.port))
    except OSError as error:
        raise ConfigError(
            f"--host {config.host} --port {config.port}: a page cannot be served there ({error.strerror})."
        ) from error


def check_text(name: str, value: object) -> None:
    """Raise `ConfigError` for what came over the network as `name` and is no text, or too much of it."""
    if not isinstance(value, str) or len(value) > MAX_QUESTION:
        raise ConfigError(f"{name} is no text of at most {MAX_QUESTION:,} characters.")


def model_name(paths: Sequence[Path]) -> str:
    """The checkpoints by name, for a page's head: `base + mine/epoch2`."""
    resolved = [path.resolve() for path in paths]
    return " + ".join(f"{p.parent.name}/{p.name}" if p.name.startswith("epoch") else p.name for p in resolved)


def serve_page(page: Blocks, config: PageConfig, **launching: Any) -> None:
    """Serve gradio's Blocks at --host and --port until interrupted; `launching` goes to their `launch`."""
    import gradio

    from demos.page_guard import MOST_BYTES, guards

    async def no_file(_named: object) -> None:
        """Refuse a file that a visitor names in place of a text: gradio would fetch it."""
        raise gradio.Error("This page takes no files.", print_exception=False)

    for part in page.blocks.values():
        part.async_move_resource_to_block_cache = no_file
    most_bytes = MOST_IMAGE_REQUEST if isinstance(config, ImageConfig) else MOST_BYTES
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=1).launch(
        server_name=config.host,
        server_port=config.port,
        auth=("accessory", config.password) if config.password else None,
        share=False,
        max_file_size=MOST_BYTES,
        state_session_capacity=MOST_VISITS,  # gradio keeps what each window's fields hold
        show_error=False,
        quiet=True,  # gradio would advise share=True
        footer_links=[],
        run_history=False,  # it would keep questions in the browser, for whoever uses it next
        prevent_thread_lock=True,
        app_kwargs={"middleware": guards(config.host, most_bytes)},
        **launching,
    )
    print(f"The page is at {page.local_url}", flush=True)
    page.block_thread()
