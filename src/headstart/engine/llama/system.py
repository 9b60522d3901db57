"""What llama.cpp was built with."""

from __future__ import annotations

import llama_cpp as lib


def build_features() -> list[str]:
    """As in "AVX2", those that the build has and this CPU too."""
    lib.llama_backend_init()
    info = lib.llama_print_system_info().decode(errors="replace")
    pairs = (part.rpartition(":")[2].partition("=") for part in info.split("|"))
    return [name.strip() for name, _, value in pairs if value.strip() == "1"]
