"""Faults in words."""

from __future__ import annotations

import inspect

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from accessory import errors
from accessory.errors import AccessoryError, explain_validation, nearest


class Inner(BaseModel):
    """A nested part."""

    factor: float


class Settings(BaseModel):
    """Something to get wrong."""

    model_config = ConfigDict(extra="forbid")

    lora_rank: int
    dim: int = 4
    inner: Inner | None = None


def explained(**values: object) -> list[str]:
    """Lines about `values`."""
    with pytest.raises(ValidationError) as caught:
        Settings(**values)
    return explain_validation(caught.value, "a.json", Settings.model_fields).splitlines()


def test_every_fault_is_an_accessory_error() -> None:
    """An entry needs to catch one class only."""
    classes = [value for _, value in inspect.getmembers(errors, inspect.isclass) if value.__module__ == errors.__name__]
    assert len(classes) == 12
    assert {value.status for value in classes} == {1, 2, 3, 4, 5, 6, 7, 75}
    assert all(issubclass(kind, AccessoryError) and kind.__doc__ for kind in classes)


@pytest.mark.parametrize(("name", "hint"), [
    ("lora_rnak", " Did you mean 'lora_rank'?"), ("dims", " Did you mean 'dim'?"), ("zzz", ""), ("", ""),
    ("lora_dim", ""), ("rank", " Did you mean 'lora_rank'?"), ("--dmi", " Did you mean 'dim'?"), ("dwt", ""),
])  # fmt: skip
def test_nearest(name: str, hint: str) -> None:
    """A hint only where something is close."""
    assert nearest(name, {"lora_rank": 1, "dim": 2}) == hint
    assert nearest(name, iter(["lora_rank", "dim"])) == hint


def test_one_line_a_fault() -> None:
    """Unknown with the nearest name, missing, and wrong with the value found."""
    assert explained(lora_rnk=3, dim="wide") == [
        "a.json: 'lora_rank' is required and missing.",
        "a.json: 'dim' is 'wide': Input should be a valid integer, unable to parse string as an integer.",
        "a.json: unknown key 'lora_rnk'. Did you mean 'lora_rank'?",
    ]


def test_nested_keys_are_shown_with_their_path() -> None:
    """As key.key."""
    assert explained(lora_rank=1, inner={"factor": "x"})[0].startswith("a.json: 'inner.factor' is 'x': ")
