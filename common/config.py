"""Configuration of a service: one frozen dataclass read from the environment, strictly. Knows no service."""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar
from uuid import uuid4

from common.messages import Role

T = TypeVar("T", bound="ServiceConfig")


EXIT_CONFIG = os.EX_CONFIG
"""Exit status of a process that cannot run with what it was given: whoever supervises it need not try again."""


class ConfigError(ValueError):
    """What the process was told to run with cannot work: a setting (named in the message), the model's folder, the device.

    To start again without a change would end the same way.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServiceConfig:
    """Settings every service has. Field `x` of service `s` is read from HEDDLE_S_X, else from HEDDLE_X, else its default."""

    nats_url: str = "nats://127.0.0.1:4222"
    instance_id: str = dataclasses.field(default_factory=lambda: uuid4().hex[:8])
    heartbeat_s: float = 1.0
    """A peer is dead after three periods without a beat."""
    log_level: str = "info"
    log_format: str = "json"
    """json or console."""

    def __post_init__(self) -> None:
        require(self.heartbeat_s > 0, "heartbeat_s", "be positive")
        require(self.log_format in ("json", "console"), "log_format", "be json or console")
        require(self.log_level in ("debug", "info", "warning", "error"), "log_level", "be debug, info, warning or error")


def require(condition: bool, field: str, rule: str) -> None:
    """Raises ConfigError unless the condition holds: "<field> must <rule>"."""
    if not condition:
        raise ConfigError(f"{field} must {rule}")


def load_config(config_type: type[T], role: Role, environ: Mapping[str, str] = os.environ) -> T:
    """The service's configuration from HEDDLE_<ROLE>_<FIELD> and HEDDLE_<FIELD>; the former wins.

    Raises ConfigError for a HEDDLE_<ROLE>_ variable that is no field, and for values that do not parse.
    """
    own = f"HEDDLE_{role.upper()}_"
    fields = {field.name: field for field in dataclasses.fields(config_type)}
    hints = typing.get_type_hints(config_type)
    for variable in environ:
        if variable.startswith(own) and variable.removeprefix(own).lower() not in fields:
            raise ConfigError(_unknown(variable, [own + name.upper() for name in fields]))
    values: dict[str, Any] = {}
    for name in fields:
        for variable in (own + name.upper(), "HEDDLE_" + name.upper()):
            if variable in environ:
                values[name] = _parse(environ[variable], hints[name], variable)
                break
    try:
        return config_type(**values)
    except ConfigError as error:
        raise ConfigError(f"{error} (settings: {own}<FIELD>, or HEDDLE_<FIELD>)") from error


def _unknown(variable: str, known: list[str]) -> str:
    near = difflib.get_close_matches(variable, known, n=1)
    return f"unknown setting {variable}; " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}")


def _parse(text: str, hint: Any, variable: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if text == "" and type(None) in options:
        return None
    (kind,) = (option for option in options if option is not type(None))
    try:
        if kind is bool:
            return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
        return kind(text)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{variable}={text!r} is not a valid {kind.__name__}") from error
