"""Flags of the demos."""

from __future__ import annotations

from accessory.config import DemoConfig, parse
from tests.config.refusal import refusal


def test_demo_flags(paths: list[str]) -> None:
    """What is not said stays open; a page that others reach needs a password."""
    config = parse(DemoConfig, paths[:2])
    assert config.quant is None and config.llama_type is None
    assert parse(DemoConfig, [*paths[:2], "--quant"]).quant is True
    assert parse(DemoConfig, [*paths[:2], "--no_quant"]).quant is False
    assert refusal([*paths[:2], "--host", "0.0.0.0"], DemoConfig) == [
        "--host 0.0.0.0 lets others reach the page: give a --password."
    ]
    assert parse(DemoConfig, [*paths[:2], "--host", "0.0.0.0", "--password", "x"]).host == "0.0.0.0"
