"""The C structures of librkllmrt.so, which changed between releases.

Three layouts are supported, each named after the release that introduced it: 1.2.0; 1.2.1, which 1.2.2 and
1.2.3 kept; 1.3.0. A structure of another layout makes the runtime crash or answer -1, so `offsets` has all
sizes and offsets, and checks them when `library` is imported.
"""

from __future__ import annotations

from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    Union,
    c_bool,
    c_char,
    c_char_p,
    c_float,
    c_int,
    c_int8,
    c_int32,
    c_size_t,
    c_uint8,
    c_uint32,
    c_void_p,
)
from dataclasses import dataclass
from enum import IntEnum
from typing import Any


class State(IntEnum):
    """The state that a callback reports. WAITING: the token's character is not complete yet."""

    NORMAL = 0
    WAITING = 1
    FINISH = 2
    ERROR = 3


INPUT_PROMPT = 0
MODE_GENERATE = 0


class OldExtendParam(Structure):
    _fields_ = [
        ("base_domain_id", c_int32),
        ("embed_flash", c_int8),
        ("enabled_cpus_num", c_int8),
        ("enabled_cpus_mask", c_uint32),
        ("reserved", c_uint8 * 106),
    ]


class ExtendParam(Structure):
    _fields_ = [
        ("base_domain_id", c_int32),
        ("embed_flash", c_int8),
        ("enabled_cpus_num", c_int8),
        ("enabled_cpus_mask", c_uint32),
        ("n_batch", c_uint8),
        ("use_cross_attn", c_int8),
        ("reserved", c_uint8 * 104),
    ]


_PARAM_HEAD: list[Any] = [
    ("model_path", c_char_p),
    ("max_context_len", c_int32),
    ("max_new_tokens", c_int32),
    ("top_k", c_int32),
    ("n_keep", c_int32),
    ("top_p", c_float),
    ("temperature", c_float),
    ("repeat_penalty", c_float),
    ("frequency_penalty", c_float),
    ("presence_penalty", c_float),
    ("mirostat", c_int32),
    ("mirostat_tau", c_float),
    ("mirostat_eta", c_float),
    ("skip_special_token", c_bool),
]
_IMAGES: list[Any] = [("img_start", c_char_p), ("img_end", c_char_p), ("img_content", c_char_p)]


class Param120(Structure):
    _fields_ = [*_PARAM_HEAD, ("is_async", c_bool), *_IMAGES, ("extend_param", OldExtendParam)]


class Param121(Structure):
    _fields_ = [*_PARAM_HEAD, ("is_async", c_bool), *_IMAGES, ("extend_param", ExtendParam)]


class Param130(Structure):
    _fields_ = [
        *_PARAM_HEAD,
        ("ignore_eos_token", c_bool),
        ("is_async", c_bool),
        ("extend_param", ExtendParam),
    ]


class TokenInput(Structure):
    _fields_ = [("input_ids", POINTER(c_int32)), ("n_tokens", c_size_t)]


class Content120(Union):
    """`room`: space for inputs with images, which determine the size."""

    _fields_ = [("prompt_input", c_char_p), ("token_input", TokenInput), ("room", c_char * 24)]


class Content121(Union):
    _fields_ = [("prompt_input", c_char_p), ("token_input", TokenInput), ("room", c_char * 48)]


class Content130(Union):
    _fields_ = [("prompt_input", c_char_p), ("token_input", TokenInput), ("room", c_char * 144)]


class Input120(Structure):
    _fields_ = [("input_type", c_int32), ("content", Content120)]


class Input121(Structure):
    _fields_ = [
        ("role", c_char_p),
        ("enable_thinking", c_bool),
        ("input_type", c_int32),
        ("content", Content121),
    ]


class Input130(Structure):
    _fields_ = [
        ("role", c_char_p),
        ("enable_thinking", c_bool),
        ("input_type", c_int32),
        ("content", Content130),
    ]


class PromptCacheParam(Structure):
    _fields_ = [("save_prompt_cache", c_int), ("prompt_cache_path", c_char_p)]


class SamplingParam(Structure):
    _fields_ = [
        ("top_k", c_int32),
        ("top_p", c_float),
        ("temperature", c_float),
        ("repeat_penalty", c_float),
        ("frequency_penalty", c_float),
        ("presence_penalty", c_float),
        ("mirostat", c_int32),
        ("mirostat_tau", c_float),
        ("mirostat_eta", c_float),
    ]


class InferParam120(Structure):
    _fields_ = [
        ("mode", c_int32),
        ("lora_params", c_void_p),
        ("prompt_cache_params", POINTER(PromptCacheParam)),
        ("keep_history", c_int),
    ]


class InferParam130(Structure):
    _fields_ = [
        ("mode", c_int32),
        ("lora_params", c_void_p),
        ("prompt_cache_params", POINTER(PromptCacheParam)),
        ("sampling_params", POINTER(SamplingParam)),
        ("keep_history", c_int),
        ("max_new_tokens", c_int32),
    ]


class Rows(Structure):
    """Hidden states or logits; never requested here."""

    _fields_ = [("values", c_void_p), ("width", c_int), ("num_tokens", c_int)]


class PerfStat(Structure):
    """Valid with FINISH only."""

    _fields_ = [
        ("prefill_time_ms", c_float),
        ("prefill_tokens", c_int),
        ("generate_time_ms", c_float),
        ("generate_tokens", c_int),
        ("memory_usage_mb", c_float),
    ]


_RESULT: list[Any] = [
    ("text", c_char_p),
    ("token_id", c_int32),
    ("last_hidden_layer", Rows),
    ("logits", Rows),
]


class Result120(Structure):
    _fields_ = _RESULT


class Result121(Structure):
    _fields_ = [*_RESULT, ("perf", PerfStat)]


Callback120 = CFUNCTYPE(None, POINTER(Result120), c_void_p, c_int)
Callback121 = CFUNCTYPE(c_int, POINTER(Result121), c_void_p, c_int)


class Callbacks(Structure):
    """The argument that initialises 1.3.0; earlier releases take the result callback itself."""

    _fields_ = [
        ("result_callback", Callback121),
        ("userdata", c_void_p),
        ("tokenizer_callback", c_void_p),
        ("tokenizer_userdata", c_void_p),
        ("embed_callback", c_void_p),
        ("embed_userdata", c_void_p),
    ]


@dataclass(frozen=True)
class Layout:
    """One ABI. `symbols`: functions that the library must export besides the common ones. `wraps_callback`:
    rkllm_init takes `Callbacks`. `sampling_per_run`: a run has sampling parameters and a cap of its own."""

    abi: str
    versions: tuple[str, ...]
    param: type[Structure]
    extend_param: type[Structure]
    input: type[Structure]
    infer_param: type[Structure]
    result: type[Structure]
    callback: Any
    symbols: tuple[str, ...] = ()
    has_perf: bool = True
    wraps_callback: bool = False
    sampling_per_run: bool = False


LAYOUTS = {
    layout.abi: layout
    for layout in (
        Layout(
            "1.2.0",
            ("1.2.0",),
            Param120,
            OldExtendParam,
            Input120,
            InferParam120,
            Result120,
            Callback120,
            has_perf=False,
        ),
        Layout(
            "1.2.1",
            ("1.2.1", "1.2.2", "1.2.3"),
            Param121,
            ExtendParam,
            Input121,
            InferParam120,
            Result121,
            Callback121,
            ("rkllm_get_kv_cache_size",),
        ),
        Layout(
            "1.3.0",
            ("1.3.0",),
            Param130,
            ExtendParam,
            Input130,
            InferParam130,
            Result121,
            Callback121,
            ("rkllm_get_kv_cache_size",),
            wraps_callback=True,
            sampling_per_run=True,
        ),
    )
}
ABIS = tuple(LAYOUTS)
VERSIONS = tuple(version for layout in LAYOUTS.values() for version in layout.versions)


def layout_of(version: str) -> Layout | None:
    """The layout of a release; None if the release is unknown."""
    return next((layout for layout in LAYOUTS.values() if version in layout.versions), None)
