"""What is known of librkllmrt.so's bytes: structures against the headers' tables, and releases told apart."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from headstart.engine.model import ModelError
from headstart.engine.rkllm import detect as detection
from headstart.engine.rkllm.detect import by_probe, by_symbols, detect
from headstart.engine.rkllm.layouts import LAYOUTS
from headstart.engine.rkllm.library import load_library
from headstart.engine.rkllm.offsets import BY_ABI, check, differences, layout_differences
from rkllm_standin import RELEASES, standin, standin_model

# From the table of sizes by release, written once more here: ExtendParam, Param, Input, InferParam, Result.
SIZES = {
    "1.2.0": (120, 208, 32, 32, 48),
    "1.2.1": (120, 208, 64, 32, 72),
    "1.3.0": (120, 184, 160, 40, 72),
}
ABIS = {"1.2.0": "1.2.0", "1.2.1": "1.2.1", "1.2.2": "1.2.1", "1.2.3": "1.2.1", "1.3.0": "1.3.0"}


def test_structures_are_where_the_headers_put_them() -> None:
    check()
    for abi, sizes in SIZES.items():
        layout = LAYOUTS[abi]
        structures = (layout.extend_param, layout.param, layout.input, layout.infer_param, layout.result)
        assert tuple(map(ctypes.sizeof, structures)) == sizes
        assert layout_differences(layout) == []


@pytest.mark.parametrize("abi", LAYOUTS)
def test_each_field_that_moved_is_noticed(abi: str) -> None:
    for role, table in BY_ABI[abi].items():
        structure = getattr(LAYOUTS[abi], role)
        for i in range(len(structure._fields_)):
            fields = [*structure._fields_[:i], ("extra", ctypes.c_int64), *structure._fields_[i:]]
            moved = type("Moved", (ctypes.Structure,), {"_fields_": fields})
            assert differences(moved, table) != []


@pytest.mark.parametrize("version", RELEASES)
def test_the_headers_compiled_separately_agree(version: str) -> None:
    """The library's own code says where its defaults are; its sources assert each offset by themselves."""
    layout = LAYOUTS[ABIS[version]]
    functions = load_library(standin(version))
    functions.rkllm_createDefaultParam.restype = layout.param
    param = functions.rkllm_createDefaultParam()
    assert (param.max_context_len, param.max_new_tokens, param.top_k, param.n_keep) == (512, 512, 40, -1)
    floats = (param.top_p, param.temperature, param.repeat_penalty, param.mirostat_tau, param.mirostat_eta)
    assert floats == pytest.approx((0.9, 0.8, 1.1, 5, 0.1))
    assert param.skip_special_token
    extend = param.extend_param
    assert (extend.embed_flash, extend.enabled_cpus_num, extend.enabled_cpus_mask) == (1, 4, 0xF0)
    if version != "1.2.0":
        assert extend.n_batch == 1


@pytest.mark.parametrize("version", RELEASES)
def test_a_release_is_found_out_by_three_signs_that_agree(version: str) -> None:
    path = standin(version)
    found = detect(path)
    assert (found.version, found.abi, found.path, found.forced) == (version, ABIS[version], path, False)
    functions = load_library(path)
    assert found.abi in by_symbols(functions)
    assert found.abi in by_probe(functions)


@pytest.mark.parametrize("version", ["1.2.1", "1.2.2"])
def test_releases_of_one_layout_are_alike(version: str) -> None:
    found = detect(standin(version, 121))
    assert (found.version, found.abi) == (version, "1.2.1")


@pytest.mark.parametrize(
    ("version", "layout", "why"),
    [
        ("1.3.0", 121, "says that it is RKLLM 1.3.0, but has default parameters like 1.2.0 or 1.2.1"),
        ("1.2.3", 130, "says that it is RKLLM 1.2.3, but has default parameters like 1.3.0"),
        ("1.2.3", 120, "says that it is RKLLM 1.2.3, but exports functions like 1.2.0"),
        ("1.2.0", 121, "says that it is RKLLM 1.2.0, but exports functions like 1.2.1 or 1.3.0"),
        ("1.2.1b1", 121, "is RKLLM 1.2.1b1; supported are 1.2.0, 1.2.1, 1.2.2, 1.2.3, 1.3.0"),
        ("1.1.4", 120, "is RKLLM 1.1.4; supported are"),
        ("1.4.0", 130, "is RKLLM 1.4.0; supported are"),
    ],
)
def test_signs_that_disagree_are_refused_unless_it_is_forced(version: str, layout: int, why: str) -> None:
    path = standin(version, layout)
    with pytest.raises(ModelError, match=why) as raised:
        detect(path)
    assert "set rkllm_abi" in str(raised.value) or "Set rkllm_abi" in str(raised.value)
    for forced, abi in ABIS.items():
        found = detect(path, forced)
        assert (found.version, found.abi, found.forced) == (version, abi, True)


def test_what_says_nothing_or_two_things_is_refused(tmp_path: Path) -> None:
    library = tmp_path / "librkllmrt.so"
    library.write_bytes(b"\x7fELF")
    with pytest.raises(ModelError, match="doesn't say which release"):
        detect(str(library))
    library.write_bytes(b"RKLLM SDK (version: 1.2.0) RKLLM SDK (version: 1.3.0)")
    with pytest.raises(ModelError, match=r"1\.2\.0 and 1\.3\.0"):
        detect(str(library))
    assert detect(str(library), "1.2.3").version == "unknown"
    library.write_bytes(b"")
    with pytest.raises(ModelError, match="can't be read"):
        detect(str(library))


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    library = tmp_path / "librkllmrt.so"
    library.write_bytes(b"RKLLM SDK (version: 1.2.3 and nothing else")
    with pytest.raises(ModelError, match="can't be loaded"):
        detect(str(library))


def test_a_library_that_is_not_there_is_told_with_where_it_was_looked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="is missing: /nowhere/"):
        detect("/nowhere/librkllmrt.so")
    monkeypatch.setattr(detection, "DIRECTORIES", (str(tmp_path),))
    with pytest.raises(ModelError, match="set rkllm_library"):
        detect("librkllmrt.so")
    (tmp_path / "librkllmrt.so").symlink_to(standin("1.3.0"))
    assert detect("librkllmrt.so").version == "1.3.0"


def test_an_unknown_release_can_not_be_forced() -> None:
    with pytest.raises(ModelError, match=r"rkllm_abi .1\.1\.4. isn't known; known are 1\.2\.0"):
        detect(standin("1.2.3"), "1.1.4")


def test_it_is_told_in_a_process_of_its_own() -> None:
    """So that a library that crashes takes nothing with it."""
    path = standin("1.2.3")
    command = [sys.executable, "-m", "headstart.engine.rkllm.detect"]
    done = subprocess.run([*command, path], capture_output=True, text=True, check=True)
    assert '"version":"1.2.3","abi":"1.2.1"' in done.stdout
    done = subprocess.run([*command, "/nowhere/x.so"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "is missing" in done.stderr


CARELESS = """
import ctypes, sys
from pathlib import Path
from headstart.engine.rkllm import layouts, offsets
abi, role, first, second = sys.argv[3:7]
structure = layouts.SamplingParam if role == "sampling" else getattr(layouts.LAYOUTS[abi], role)
offsets.check = lambda: None
if first:
    fields = list(structure._fields_)
    names = [name for name, *_ in fields]
    i, j = names.index(first), names.index(second)
    fields[i], fields[j] = fields[j], fields[i]
    moved = type(structure.__name__, (ctypes.Structure,), {"_fields_": fields})
    if role == "sampling":
        layouts.SamplingParam = moved
        fields = [(name, ctypes.POINTER(moved) if name == "sampling_params" else type_)
                  for name, type_ in layouts.InferParam130._fields_]
        role, moved = "infer_param", type("InferParam", (ctypes.Structure,), {"_fields_": fields})
    object.__setattr__(layouts.LAYOUTS[abi], role, moved)
    if role == "extend_param":
        param = layouts.LAYOUTS[abi].param
        fields = [(name, moved if name == role else type_) for name, type_ in param._fields_]
        whole = type(param.__name__, (ctypes.Structure,), {"_fields_": fields})
        object.__setattr__(layouts.LAYOUTS[abi], "param", whole)
    if role == "result":
        kind = None if abi == "1.2.0" else ctypes.c_int
        callback = ctypes.CFUNCTYPE(kind, ctypes.POINTER(moved), ctypes.c_void_p, ctypes.c_int)
        object.__setattr__(layouts.LAYOUTS[abi], "callback", callback)
from headstart.engine.rkllm.options import RuntimeOptions
from headstart.engine.rkllm.runtime import Runtime
from headstart.protocol import Sampling
sampling = Sampling(1.9, 0.95, 600, 0, 0.25, -0.5, 3.0)
options = RuntimeOptions(sys.argv[1], abi, 512, 100, sampling, cpus=1)
runtime = Runtime(sys.argv[2], options)
got = []
run = runtime.run("Hello", max_new_tokens=20, sampling=sampling, save_to=sys.argv[7],
                  on_token=lambda token, text: not got.append((token, text)))
assert Path(sys.argv[7]).stat().st_size > 0
assert all(text == bytes([token]) for token, text in got)
assert run.tokens == len(got) > 0 and run.prefill_tokens in (None, 5), run
print(got)
"""
# Fields that change places with a neighbour, as they would by a careless edit.
PARAM_SWAPS = [
    ("max_context_len", "max_new_tokens"),
    ("max_new_tokens", "top_k"),
    ("top_k", "n_keep"),
    ("n_keep", "top_p"),
    ("top_p", "temperature"),
    ("temperature", "repeat_penalty"),
    ("repeat_penalty", "frequency_penalty"),
    ("presence_penalty", "mirostat"),
    ("mirostat", "mirostat_tau"),
    ("mirostat_tau", "mirostat_eta"),
    ("model_path", "max_context_len"),
]
# Both may have each other's values, so all that they change is the text.
QUIET = ("frequency_penalty", "presence_penalty")
EXTEND_SWAPS = [("base_domain_id", "embed_flash"), ("embed_flash", "enabled_cpus_mask")]
RESULT_SWAPS = [("text", "token_id"), ("token_id", "last_hidden_layer")]
SWAPS = [("param", *pair) for pair in PARAM_SWAPS]
SWAPS += [("extend_param", *pair) for pair in EXTEND_SWAPS]
SWAPS += [("result", *pair) for pair in RESULT_SWAPS]
BY_LAYOUT: dict[str, list[tuple[str, str, str]]] = {
    "1.2.0": [
        *SWAPS,
        ("param", *QUIET),
        ("param", "is_async", "img_start"),
        ("infer_param", "mode", "prompt_cache_params"),
        ("infer_param", "prompt_cache_params", "keep_history"),
        ("input", "input_type", "content"),
    ],
    "1.2.1": [
        *SWAPS,
        ("param", *QUIET),
        ("param", "img_content", "extend_param"),
        ("extend_param", "n_batch", "use_cross_attn"),
        ("infer_param", "lora_params", "prompt_cache_params"),
        ("input", "role", "content"),
        ("input", "input_type", "role"),
        ("result", "logits", "perf"),
    ],
    "1.3.0": [
        *SWAPS,
        ("param", "skip_special_token", "extend_param"),
        ("sampling", *QUIET),
        ("sampling", "top_k", "top_p"),
        ("sampling", "temperature", "top_p"),
        ("sampling", "temperature", "repeat_penalty"),
        ("infer_param", "prompt_cache_params", "sampling_params"),
        ("infer_param", "keep_history", "max_new_tokens"),
        ("input", "role", "content"),
        ("result", "last_hidden_layer", "perf"),
    ],
}


def _careless(
    tmp_path: Path, version: str, role: str, first: str, second: str
) -> subprocess.CompletedProcess[str]:
    model, saved = standin_model(tmp_path / "model.rkllm"), tmp_path / "saved"
    saved.unlink(missing_ok=True)
    arguments = [standin(version), model, ABIS[version], role, first, second, str(saved)]
    return subprocess.run(
        [sys.executable, "-c", CARELESS, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "RKLLM_STANDIN": "decode_ms=0"},
    )


@pytest.mark.parametrize("version", RELEASES)
@pytest.mark.slow
def test_a_backend_with_two_fields_exchanged_fails(tmp_path: Path, version: str) -> None:
    """Loudly, as the stand-in is strict: it dies or is refused. Only one sampling parameter instead of
    another changes no more than the text."""
    right = _careless(tmp_path, version, "param", "", "")
    assert right.returncode == 0, right.stderr
    for role, first, second in BY_LAYOUT[ABIS[version]]:
        wrong = _careless(tmp_path, version, role, first, second)
        if (first, second) == QUIET:
            assert wrong.stdout != right.stdout, role
        else:
            assert wrong.returncode != 0, (role, first, second)
