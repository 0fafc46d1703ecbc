"""Checks of the settings of formats, with errors that say what to give instead."""

from __future__ import annotations

import math

import torch

from dither.core import SpecError


def check_count(owner: str, setting: str, value: object, least: int, most: int) -> None:
    """Raise :class:`SpecError` unless a setting is an integer within bounds."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise SpecError(f"{owner}({setting}={value!r}): give an integer from {least} to {most}")


def check_choice(owner: str, setting: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise :class:`SpecError` unless a setting is one of the choices."""
    # A list or a bool compares equal to nothing here; an unhashable value is no problem.
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        names = ", ".join(str(choice) for choice in choices)
        raise SpecError(f"{owner}({setting}={value!r}): give one of {names}")


def check_number(owner: str, setting: str, value: object, most: float = math.inf) -> None:
    """Raise :class:`SpecError` unless a setting is a finite number above 0, at most ``most``."""
    fits = isinstance(value, float | int) and 0 < value <= most and math.isfinite(value)
    if not fits or isinstance(value, bool):
        limit = "" if most == math.inf else f", at most {most:g}"
        raise SpecError(f"{owner}({setting}={value!r}): give a finite number above 0{limit}")


def check_kind(owner: str, value: object, kinds: tuple[type, ...]) -> None:
    """Raise :class:`SpecError` unless the setting ``format`` is one of the kinds of format."""
    if not isinstance(value, kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise SpecError(f"{owner}(format={value!r}): give a format of the kind {names}")


def check_flag(owner: str, setting: str, value: object) -> None:
    """Raise :class:`SpecError` unless a setting is True or False."""
    if not isinstance(value, bool):
        raise SpecError(f"{owner}({setting}={value!r}): give True or False")


def check_restored(name: str, dtype: torch.dtype) -> None:
    """Raise :class:`SpecError` unless a tensor's type is floating point."""
    if not dtype.is_floating_point:
        raise SpecError(f"format {name!r} restores floating-point types, not {dtype}")
