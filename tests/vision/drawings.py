"""Pictures of coloured shapes, and questions about them that only the picture answers."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 70, 220), "yellow": (240, 210, 40)}
SHAPES = ("circle", "square", "cross")
COUNTS = ("one", "two", "three", "four")
QUESTIONS = ("Which colour?", "Which shape?", "How many?")
ANSWERS = (tuple(COLOURS), SHAPES, COUNTS)
"""What each question may be answered with."""
SIDE = 56
CELL = SIDE // 2


@dataclass(frozen=True)
class Drawing:
    """One to four equal shapes in the quarters of a square on a grey ground, drawn from `seed`."""

    seed: int

    @property
    def classes(self) -> tuple[int, int, int]:
        """Places of its colour, shape and count in `ANSWERS`."""
        drawn = random.Random(self.seed)
        return drawn.randrange(len(COLOURS)), drawn.randrange(len(SHAPES)), drawn.randrange(len(COUNTS))

    @property
    def answers(self) -> tuple[str, ...]:
        """The answers to `QUESTIONS`."""
        return tuple(answers[place] for answers, place in zip(ANSWERS, self.classes, strict=True))

    def image(self) -> Image.Image:
        """The picture, RGB [SIDE, SIDE]. Places, sizes and the ground differ from picture to picture."""
        drawn, (colour, shape, count) = random.Random(f"places of {self.seed}"), self.classes
        ground = drawn.choice((drawn.randint(0, 70), drawn.randint(185, 255)))
        image = Image.new("RGB", (SIDE, SIDE), (ground,) * 3)
        canvas = ImageDraw.Draw(image)
        for quarter in drawn.sample(range(4), count + 1):
            radius, x, y = drawn.randint(8, 11), drawn.randint(-2, 2), drawn.randint(-2, 2)
            middle = (CELL * (quarter % 2) + CELL // 2 + x, CELL * (quarter // 2) + CELL // 2 + y)
            _draw(canvas, SHAPES[shape], *middle, radius, list(COLOURS.values())[colour])
        return image

    def save(self, folder: Path) -> str:
        """Write the picture below `folder`; its name there."""
        name = f"{self.seed}.png"
        self.image().save(folder / name)
        return name


def _draw(canvas: ImageDraw.ImageDraw, shape: str, x: int, y: int, radius: int, fill: tuple[int, int, int]) -> None:
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        canvas.ellipse(box, fill=fill)
    elif shape == "square":
        canvas.rectangle(box, fill=fill)
    else:
        canvas.rectangle((box[0], y - 2, box[2], y + 2), fill=fill)
        canvas.rectangle((x - 2, box[1], x + 2, box[3]), fill=fill)
