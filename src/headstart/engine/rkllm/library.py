"""Calls librkllmrt.so by one layout: declares each function's types, and turns return codes into
ModelError."""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, byref, c_char_p, c_int, c_void_p
from typing import Any

from headstart.engine.model import ModelError
from headstart.engine.rkllm import offsets
from headstart.engine.rkllm.layouts import Callbacks, Layout

# The functions that every supported release exports.
SYMBOLS = (
    "rkllm_createDefaultParam",
    "rkllm_init",
    "rkllm_destroy",
    "rkllm_run",
    "rkllm_abort",
    "rkllm_load_prompt_cache",
    "rkllm_release_prompt_cache",
    "rkllm_set_chat_template",
    "rkllm_clear_kv_cache",
)

offsets.check()


def load_library(path: str) -> ctypes.CDLL:
    """Raises ModelError."""
    try:
        return ctypes.CDLL(path)
    except OSError as error:
        raise ModelError(f"the NPU runtime can't be loaded: {error}") from error


class Library:
    """`init` returns a handle; except for `abort`, one thread at a time may use it. All methods raise
    ModelError if the runtime refuses."""

    def __init__(self, path: str, layout: Layout) -> None:
        self.layout = layout
        self._functions = load_library(path)
        missing = [name for name in (*SYMBOLS, *layout.symbols) if not hasattr(self._functions, name)]
        if missing:
            raise ModelError(f"{path} has no {', '.join(missing)}: it isn't RKLLM {layout.abi}")
        self._declare()

    def _declare(self) -> None:
        layout, functions = self.layout, self._functions
        start = POINTER(Callbacks) if layout.wraps_callback else layout.callback
        ranges = [c_void_p, c_void_p] if layout.has_perf else []
        arguments: dict[str, list[Any]] = {
            "init": [POINTER(c_void_p), POINTER(layout.param), start],
            "destroy": [c_void_p],
            "run": [c_void_p, POINTER(layout.input), POINTER(layout.infer_param), c_void_p],
            "abort": [c_void_p],
            "load_prompt_cache": [c_void_p, c_char_p],
            "release_prompt_cache": [c_void_p],
            "set_chat_template": [c_void_p, c_char_p, c_char_p, c_char_p],
            # From 1.2.1 on it takes ranges of positions; none means all.
            "clear_kv_cache": [c_void_p, c_int, *ranges],
        }
        for name, types in arguments.items():
            function = getattr(functions, f"rkllm_{name}")
            function.argtypes, function.restype = types, c_int
        functions.rkllm_createDefaultParam.argtypes = []
        functions.rkllm_createDefaultParam.restype = layout.param

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._functions, f"rkllm_{name}")(*arguments)
        if code != 0:
            raise ModelError(f"the NPU runtime's rkllm_{name} answered {code}")

    def default_param(self) -> Any:
        return self._functions.rkllm_createDefaultParam()

    def init(self, param: Any, callback: Any) -> c_void_p:
        """Loads the model. The callback must stay referenced as long as the handle is used."""
        handle = c_void_p()
        start = byref(callback) if self.layout.wraps_callback else callback
        self._call("init", byref(handle), byref(param), start)
        return handle

    def destroy(self, handle: c_void_p) -> None:
        self._call("destroy", handle)

    def run(self, handle: c_void_p, input_: Any, infer_param: Any, number: int) -> None:
        self._call("run", handle, byref(input_), byref(infer_param), c_void_p(number))

    def abort(self, handle: c_void_p) -> None:
        """Aborts the run, if there is one; its end is no error."""
        self._functions.rkllm_abort(handle)

    def load_cache(self, handle: c_void_p, path: str) -> None:
        self._call("load_prompt_cache", handle, os.fsencode(path))

    def release_cache(self, handle: c_void_p) -> None:
        self._call("release_prompt_cache", handle)

    def unset_template(self, handle: c_void_p) -> None:
        """Sets an empty template: prompts are rendered already, and the model's own would wrap them again."""
        self._call("set_chat_template", handle, b"", b"", b"")

    def clear(self, handle: c_void_p) -> None:
        ranges = (None, None) if self.layout.has_perf else ()
        self._call("clear_kv_cache", handle, 0, *ranges)
