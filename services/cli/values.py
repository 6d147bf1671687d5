"""How the values of options are read, with complaints that say what they may be. Knows no option."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

from common.config import ConfigError
from common.drafts import AUTO, parse_drafts
from common.sharing import parse_sharing
from common.speculation import parse_speculation


def path(text: str) -> Path:
    """A path from the user's home or the current folder on."""
    return Path(text).expanduser().absolute()


def rate(text: str) -> float:
    """A positive number."""
    return _number(text, 0.0, math.inf)


def share(text: str) -> float:
    """A number from 0 to 1."""
    return _number(text, -math.inf, 1.0)


def _number(text: str, above: float, highest: float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not max(above, -sys.float_info.min) < number <= highest or math.isinf(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a {'positive number' if above == 0 else 'number from 0 to 1'}")
    return number


def speculation(text: str) -> str:
    """A way to choose draft trees, as planners take it."""
    try:
        parse_speculation(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def sharing(text: str) -> str:
    """Which iterations finetuning shares, as executors take it."""
    try:
        parse_sharing(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def drafts(text: str) -> str:
    """A list of drafters, as the planner takes it."""
    try:
        return AUTO if text == AUTO else ",".join(str(spec) for spec in parse_drafts(text))
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def within(lowest: int, highest: int | None = None) -> Callable[[str], int]:
    """A parser of whole numbers of a range, with a readable complaint."""

    def parse(text: str) -> int:
        number = int(text) if text.lstrip("-").isdigit() else None
        if number is None or number < lowest or (highest is not None and number > highest):
            rule = f"at least {lowest}" if highest is None else f"{lowest} to {highest}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, {rule}")
        return number

    return parse
