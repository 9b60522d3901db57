"""The source of a setting's value, as `headstart doctor` shows it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from headstart.config.settings import Settings

SettingSource = Literal["flag", "environment", "file", "default"]


def origin(settings: Settings, name: str, flags: Mapping[str, Any]) -> SettingSource:
    """The source of a setting's value; `flags` are those that `load_settings` got."""
    if flags.get(name) not in (None, {}):
        return "flag"
    if name not in settings.model_fields_set:
        return "default"
    if any(variable.upper() == f"HEADSTART_{name.upper()}" for variable in os.environ):
        return "environment"
    return "file"
