"""The settings in force for a model on the NPU: others than those of llama.cpp's models."""

from __future__ import annotations

from headstart.config.settings import Settings
from headstart.engine.model import ModelError
from headstart.engine.rkllm.build import options_of
from headstart.engine.rkllm.options import checked
from headstart.errors import StartupError
from headstart.service.plan import engine_settings


def npu_settings(path: str, settings: Settings) -> dict[str, str]:
    """By their names. Raises StartupError where the model can't be loaded with them."""
    try:
        options = checked(path, options_of(engine_settings(path, settings)))
    except ModelError as error:
        raise StartupError(str(error)) from error
    return {
        "ctx": str(options.n_ctx),
        "rkllm_library": options.library,
        "rkllm_abi": options.abi or "found out",
        "rkllm_cpus": str(options.cpus),
        "rkllm_cpu_mask": f"{options.cpu_mask:#x}",
        "rkllm_embed_flash": "on" if options.embed_flash else "off",
    }
