"""Flags of the demos."""

from __future__ import annotations

from pathlib import Path

import pytest

from accessory.config import DemoConfig, ImageDemoConfig, ImagePageConfig, ImageTerminalConfig, parse
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


def test_flags_about_images_beside_those_of_other_demos(tmp_path: Path) -> None:
    """Defaults are those of the demo without images; an image is looked at before a model is loaded."""
    paths = ["--pretrained_path", str(tmp_path)]
    assert parse(ImageTerminalConfig, paths).max_gen_len == parse(ImagePageConfig, paths).max_gen_len == 512
    assert parse(ImageDemoConfig, paths).max_gen_len == 128
    assert parse(ImageDemoConfig, paths).image_transform == "resized_center_crop"
    assert parse(ImagePageConfig, paths).image_transform == "padded_resize"
    pytest.importorskip("PIL", reason="images need Pillow")
    assert refusal([*paths, "--image", str(tmp_path)], ImageDemoConfig) == [
        f"--image {tmp_path}: is a directory.",
        "--image goes with --prompt: on the page, images are put into a box.",
    ]
