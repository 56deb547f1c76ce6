"""Flags of the demos. The string under a field is its `--help` and its row in docs/flags.md."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from accessory.config.files import misplaced_files
from accessory.data.image_files import ImageFault, check_image
from accessory.data.pictures import CROPPED, TRANSFORMS
from accessory.data.templates import PROMPT_LAYOUTS
from accessory.quant import QUANT_TYPES

STILL = tuple(name for name in TRANSFORMS if name != CROPPED)
"""How an image may be brought to the encoder's size where nothing is drawn."""
LOOPBACK = ("127.0.0.1", "localhost")
"""Hosts that only this machine reaches."""


class AskConfig(BaseModel):
    """What every demo takes: the model and how it answers."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True, allow_inf_nan=False)

    pretrained_path: list[Path] = Field(min_length=1)
    """Base, then trained parts; or a trained part alone, whose run.json knows its base."""
    llama_type: str | None = None
    """Family and method; absent: what the checkpoint says."""
    llama_config: list[Path] = []
    """JSON files of settings, laid over the checkpoint's own."""
    tokenizer_path: Path | None = None
    """Tokenizer; absent: what lies in the checkpoint."""
    vision_path: Path | None = None
    """A Hugging Face directory of BLIP-2 or CLIP, for the image encoder; absent: the checkpoint's own, if any."""
    no_visual: bool = False
    """Leave out the image encoder that the checkpoint has."""
    max_seq_len: int = Field(default=4096, ge=2)
    """Longest prompt and answer together, in tokens."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes CUDA where there is any."""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Compute precision."""
    quant: bool | None = None
    """Keep the base packed; absent: as the trained part was trained."""
    quant_type: Literal[QUANT_TYPES] | None = None
    """Format of the packed base; absent: as trained, or nf4."""
    max_gen_len: int = Field(default=128, ge=1)
    """Longest answer, in tokens."""
    temperature: float = Field(default=0.1, ge=0)
    """0 always takes the likeliest token."""
    top_p: float = Field(default=0.75, gt=0, le=1)
    """Sample from the likeliest tokens that together have this probability."""
    top_k: int = Field(default=0, ge=0)
    """Sample from this many of the likeliest tokens; 0: from all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Sample from tokens that are at least this many times as likely as the likeliest one."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Above 1 makes tokens less likely that stand in the prompt or the answer so far."""
    stop: list[str] = []
    """Texts that end an answer, and are not shown."""
    seed: int = 0
    """Seed of the sampling."""
    dist_on_itp: bool = False
    """Take rank and world size from OpenMPI's variables."""
    n_gpus: int | None = Field(default=None, ge=1)
    """Start this many processes that share the model, each on a GPU (or on the CPU), where no torchrun does."""
    gpu_ids: list[Annotated[int, Field(ge=0)]] = []
    """Start a process on each of these GPUs."""

    @property
    def own_ranks(self) -> list[int]:
        """The GPU of each process to start; none where they are not asked for."""
        return self.gpu_ids or list(range(self.n_gpus or 0))

    def faults(self) -> list[str]:
        """Combinations that cannot work, and files that are not there; empty where all is well."""
        found = misplaced_files(
            pretrained_path=self.pretrained_path, llama_config=self.llama_config, tokenizer_path=[self.tokenizer_path],
            vision_path=[self.vision_path],
        )  # fmt: skip
        if self.quant is False and self.quant_type:
            found.append(f"--quant_type {self.quant_type} contradicts --no_quant: leave one out.")
        if self.gpu_ids and self.n_gpus not in (None, len(self.gpu_ids)):
            found.append(f"--n_gpus {self.n_gpus} contradicts --gpu_ids, which are {len(self.gpu_ids)}: leave one out.")
        if len(set(self.gpu_ids)) < len(self.gpu_ids):
            found.append(f"--gpu_ids {' '.join(map(str, self.gpu_ids))}: names a GPU twice.")
        return found


class ImageConfig(AskConfig):
    """What a demo takes that is asked about images, too."""

    image_transform: Literal[STILL] = "padded_resize"
    """How an image becomes the square that the encoder sees: with bars, or cut to its middle."""


class GivenImageConfig(ImageConfig):
    """What a demo takes whose first image may be named by a flag, too."""

    image: Path | None = None
    """The image to ask about, a JPEG, PNG, WebP or GIF."""

    def faults(self) -> list[str]:
        """Those of `ImageConfig`, and what is wrong with the image's file. Raises `ConfigError` without Pillow."""
        found = super().faults()
        if self.image:
            try:
                check_image(self.image)
            except ImageFault as fault:
                found.append(f"--image {self.image}: {fault}.")
        return found


class PageConfig(AskConfig):
    """What a demo with a page takes, too."""

    host: str = "127.0.0.1"
    """Address the page is served at; another than loopback needs --password."""
    port: int = Field(default=7860, ge=1, le=65535)
    """Port of the page."""
    password: str | None = None
    """Password of the page (user name: accessory)."""

    def faults(self) -> list[str]:
        """Those of `AskConfig`, and a page that strangers would reach."""
        found = super().faults()
        if ":" in self.host:
            found.append(
                f"--host {self.host}: expected a name or an IPv4 address; the page's library takes no IPv6 one."
            )
        elif self.host not in LOOPBACK and not self.password:
            found.append(f"--host {self.host} lets others reach the page: give a --password.")
        return found


class DemoConfig(PageConfig):
    """Ask a base model, or a base with a trained part, single questions."""

    prompt: list[str] = []
    """Questions to answer in the terminal; without any, a page is served."""
    system_prompt: Literal[PROMPT_LAYOUTS] | None = None
    """Prompt layout; absent: that of the training data; for a base its chat template, or alpaca."""


class TalkConfig(AskConfig):
    """What a demo takes that remembers what was said, too."""

    max_gen_len: int = Field(default=512, ge=1)
    """Longest answer, in tokens."""
    system: str | None = None
    """Words of the system before the first turn; absent: those of the training data, or of the prompt layout."""
    system_prompt: Literal[PROMPT_LAYOUTS] | None = None
    """Prompt layout; absent: that of the training data; for a base its chat template, or dialog."""


class TerminalConfig(TalkConfig):
    """Talk with a base model, or a base with a trained part, in the terminal."""

    prompt: list[str] = []
    """Ask these one after the other, and read nothing from the terminal."""


class ChatPageConfig(TalkConfig, PageConfig):
    """Talk with a base model, or a base with a trained part, on a page that remembers what was said."""

    kept_caches: int = Field(default=4, ge=1)
    """Conversations whose keys and values stay in memory; those of others are computed anew when they go on."""


class ImageDemoConfig(DemoConfig, GivenImageConfig):
    """Ask a model that sees images single questions, about an image or about none."""

    image_transform: Literal[STILL] = "resized_center_crop"
    """How an image becomes the square that the encoder sees: cut to its middle, or with bars."""

    def faults(self) -> list[str]:
        """Those of the classes above, and an image without a question."""
        alone = self.image is not None and not self.prompt
        return [*super().faults(), *["--image goes with --prompt: on the page, images are put into a box."] * alone]


class ImageTerminalConfig(TerminalConfig, GivenImageConfig):
    """Talk with a model that sees images, about an image or about none, in the terminal."""


class ImagePageConfig(ChatPageConfig, ImageConfig):
    """Talk with a model that sees images, about an image or about none, on a page."""
