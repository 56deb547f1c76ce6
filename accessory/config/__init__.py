"""Every flag of training and of the demos, as configs that a command line or Python code fills."""

from __future__ import annotations

from accessory.config.asking import (
    LOOPBACK,
    AskConfig,
    ChatPageConfig,
    DemoConfig,
    ImageConfig,
    ImageDemoConfig,
    ImagePageConfig,
    ImageTerminalConfig,
    PageConfig,
    TalkConfig,
    TerminalConfig,
)
from accessory.config.command_line import Config, parse, plain
from accessory.config.finetuning import FinetuneConfig
from accessory.config.pretraining import PretrainConfig
from accessory.config.running import TRACKERS, RunConfig

__all__ = [
    "LOOPBACK",
    "TRACKERS",
    "AskConfig",
    "ChatPageConfig",
    "Config",
    "DemoConfig",
    "FinetuneConfig",
    "ImageConfig",
    "ImageDemoConfig",
    "ImagePageConfig",
    "ImageTerminalConfig",
    "PageConfig",
    "PretrainConfig",
    "RunConfig",
    "TalkConfig",
    "TerminalConfig",
    "parse",
    "plain",
]
