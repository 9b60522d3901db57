"""Most generated requests name the model and the cache that there are: others are all refused alike."""

from __future__ import annotations

from typing import Any

import schemathesis
from schemathesis import HookContext

NAMES = {"model": "toy", "name": "known", "use_cache": "known", "cache_name": "known"}


@schemathesis.hook
def map_body(context: HookContext, body: Any) -> Any:
    if isinstance(body, dict):
        body |= {key: name for key, name in NAMES.items() if isinstance(body.get(key), str)}
    return body


@schemathesis.hook
def map_path_parameters(context: HookContext, path_parameters: Any) -> Any:
    if isinstance(path_parameters, dict):
        path_parameters |= {key: name for key, name in NAMES.items() if key in path_parameters}
    return path_parameters
