"""Offsets of the fields in the runtime's structures, by its headers; the same on aarch64 and x86-64."""

from __future__ import annotations

from ctypes import Structure, sizeof

from headstart.engine.rkllm.layouts import (
    LAYOUTS,
    Callbacks,
    Layout,
    PerfStat,
    PromptCacheParam,
    SamplingParam,
)

Table = dict[str, int]

_SAMPLING: Table = {
    "sizeof": 36, "top_k": 0, "top_p": 4, "temperature": 8, "repeat_penalty": 12, "frequency_penalty": 16,
    "presence_penalty": 20, "mirostat": 24, "mirostat_tau": 28, "mirostat_eta": 32,
}  # fmt: skip
_PARAM: Table = {
    "model_path": 0, "max_context_len": 8, "max_new_tokens": 12, "top_k": 16, "n_keep": 20, "top_p": 24,
    "temperature": 28, "repeat_penalty": 32, "frequency_penalty": 36, "presence_penalty": 40, "mirostat": 44,
    "mirostat_tau": 48, "mirostat_eta": 52, "skip_special_token": 56,
}  # fmt: skip
_OLD_PARAM: Table = {
    **_PARAM, "sizeof": 208, "is_async": 57, "img_start": 64, "img_end": 72, "img_content": 80,
    "extend_param": 88,
}  # fmt: skip
_CPUS: Table = {"base_domain_id": 0, "embed_flash": 4, "enabled_cpus_num": 5, "enabled_cpus_mask": 8}
_NEW_EXTEND: Table = {**_CPUS, "sizeof": 120, "n_batch": 12, "use_cross_attn": 13, "reserved": 14}
_NEW_INPUT: Table = {"role": 0, "enable_thinking": 8, "input_type": 12, "content": 16}
_OLD_INFER: Table = {
    "sizeof": 32, "mode": 0, "lora_params": 8, "prompt_cache_params": 16, "keep_history": 24,
}  # fmt: skip
_RESULT: Table = {"text": 0, "token_id": 8, "last_hidden_layer": 16, "logits": 32}

COMMON: dict[type[Structure], Table] = {
    PromptCacheParam: {"sizeof": 16, "save_prompt_cache": 0, "prompt_cache_path": 8},
    SamplingParam: _SAMPLING,
    PerfStat: {
        "sizeof": 20, "prefill_time_ms": 0, "prefill_tokens": 4, "generate_time_ms": 8, "generate_tokens": 12,
        "memory_usage_mb": 16,
    },
    Callbacks: {
        "sizeof": 48, "result_callback": 0, "userdata": 8, "tokenizer_callback": 16, "tokenizer_userdata": 24,
        "embed_callback": 32, "embed_userdata": 40,
    },
}  # fmt: skip
BY_ABI: dict[str, dict[str, Table]] = {
    "1.2.0": {
        "param": _OLD_PARAM,
        "extend_param": {**_CPUS, "sizeof": 120, "reserved": 12},
        "input": {"sizeof": 32, "input_type": 0, "content": 8},
        "infer_param": _OLD_INFER,
        "result": {**_RESULT, "sizeof": 48},
    },
    "1.2.1": {
        "param": _OLD_PARAM,
        "extend_param": _NEW_EXTEND,
        "input": {**_NEW_INPUT, "sizeof": 64},
        "infer_param": _OLD_INFER,
        "result": {**_RESULT, "sizeof": 72, "perf": 48},
    },
    "1.3.0": {
        "param": {**_PARAM, "sizeof": 184, "ignore_eos_token": 57, "is_async": 58, "extend_param": 60},
        "extend_param": _NEW_EXTEND,
        "input": {**_NEW_INPUT, "sizeof": 160},
        "infer_param": {
            "sizeof": 40, "mode": 0, "lora_params": 8, "prompt_cache_params": 16, "sampling_params": 24,
            "keep_history": 32, "max_new_tokens": 36,
        },
        "result": {**_RESULT, "sizeof": 72, "perf": 48},
    },
}  # fmt: skip


def differences(structure: type[Structure], table: Table) -> list[str]:
    """The differences between the structure and the table, which must have all its fields."""
    actual = {name: getattr(structure, name).offset for name, *_ in structure._fields_}
    actual["sizeof"] = sizeof(structure)
    return [
        f"{structure.__name__}.{name}: {actual.get(name)}, not {table.get(name)}"
        for name in sorted(actual.keys() | table.keys())
        if actual.get(name) != table.get(name)
    ]


def layout_differences(layout: Layout) -> list[str]:
    structures = [(getattr(layout, role), table) for role, table in BY_ABI[layout.abi].items()]
    return [line for structure, table in structures for line in differences(structure, table)]


def check() -> None:
    """Raises AssertionError, also with assertions disabled: a wrong structure corrupts memory."""
    wrong = [line for layout in LAYOUTS.values() for line in layout_differences(layout)]
    wrong += [line for structure, table in COMMON.items() for line in differences(structure, table)]
    if wrong:
        raise AssertionError(f"the NPU runtime's structures are wrong here: {'; '.join(wrong)}")
