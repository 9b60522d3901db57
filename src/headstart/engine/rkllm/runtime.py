"""The runtime with one model loaded, as the engine uses it: one run at a time, with all arguments checked.

Behaviour that the runtime's header omits or states wrongly: - It wraps a prompt in the model's template
unless an empty one is set. - rkllm_abort has no effect if called too early, and doesn't end a prefill. A run
has ended only with FINISH. - Loading a state right after a run that was aborted at its first token has
crashed it: the model is loaded again
  before.
"""

from __future__ import annotations

import os
import threading
from ctypes import c_void_p, pointer
from itertools import count
from pathlib import Path
from typing import Any

from headstart.engine.model import ModelError
from headstart.engine.rkllm.detect import detect
from headstart.engine.rkllm.layouts import (
    INPUT_PROMPT,
    LAYOUTS,
    MODE_GENERATE,
    Callbacks,
    PromptCacheParam,
    SamplingParam,
)
from headstart.engine.rkllm.library import Library
from headstart.engine.rkllm.options import RuntimeOptions, checked
from headstart.engine.rkllm.run import OnToken, Run, Running
from headstart.engine.rkllm.sampling import sampling_fields
from headstart.protocol import Sampling

# The callbacks of all runtimes of this process. Nothing promises that the library calls back only while a
# model is loaded, and a call of one that was collected crashes the process.
_CALLBACKS: list[Any] = []
# The longest wait for FINISH after rkllm_run has returned.
FINISH_SECONDS = 30.0


class RuntimeLost(ModelError):
    """The runtime is in an unknown state; the process should end."""


class Runtime:
    """Raises ModelError if the library or the model can't be loaded. Only `abort` is thread-safe.

    `version` is the library's own, such as "1.2.3"; `abi` is the layout used with it, such as "1.2.1".
    `per_request_sampling`: `run` uses its own sampling and cap; else those of the options apply, and `run`
    aborts an answer at a lower cap. `has_perf`: the runtime counts prefilled tokens; otherwise nothing
    confirms a hit. `loads`: the number of times that the model was loaded.
    """

    def __init__(self, model_path: str, options: RuntimeOptions) -> None:
        self.options = checked(model_path, options)
        self._model_path = model_path
        if options.log_level is not None:
            os.environ["RKLLM_LOG_LEVEL"] = str(options.log_level)
        found = detect(options.library, options.abi)
        self.version, self.abi = found.version, found.abi
        self._layout = LAYOUTS[found.abi]
        self.per_request_sampling = self._layout.sampling_per_run
        self.has_perf = self._layout.has_perf
        self.loads = 0
        self._library = Library(found.path, self._layout)
        self._numbers = count(1)
        self._running: Running | None = None
        self._cache_loaded = False
        self._aborted_early = False
        self._callback = self._layout.callback(self._on_result)
        _CALLBACKS.append(self._callback)
        if self._layout.wraps_callback:
            self._callback = Callbacks(result_callback=self._callback)
        self._handle: c_void_p | None = None
        self._load()

    def _load(self) -> None:
        self._handle = self._library.init(self._param(), self._callback)
        self.loads += 1
        try:
            self._library.unset_template(self._handle)
        except ModelError:
            self.close()
            raise

    def _param(self) -> Any:
        """The library's defaults, except for the parameters that are known to matter."""
        options, param = self.options, self._library.default_param()
        param.model_path = os.fsencode(Path(self._model_path).absolute())
        param.max_context_len = options.n_ctx
        param.max_new_tokens = options.max_new_tokens
        for name, value in sampling_fields(options.sampling).items():
            setattr(param, name, value)
        # Special tokens must be reported too: text is made from the ids.
        param.skip_special_token = False
        param.is_async = False
        if self._layout.wraps_callback:
            param.ignore_eos_token = False
        else:
            # A null pointer crashes the runtime.
            param.img_start = param.img_end = param.img_content = b""
        extend = param.extend_param
        extend.embed_flash = options.embed_flash
        extend.enabled_cpus_num, extend.enabled_cpus_mask = options.cpus, options.cpu_mask
        if self.has_perf:
            extend.n_batch = 1
        return param

    def run(
        self,
        prompt: str,
        *,
        max_new_tokens: int,
        sampling: Sampling,
        save_to: str | None = None,
        keep_history: int = 0,
        on_token: OnToken,
    ) -> Run:
        """Runs the whole prompt, which is never wrapped in a template. The longest prefix in common with the
        loaded cache or the last run is reused if `keep_history` is 0. Returns when the runtime has reported
        FINISH.

        `on_token` receives each token and its text (b"" while a character is incomplete) on a thread of the
        runtime's. After it has returned False, it isn't called again; its exceptions are raised here.
        `save_to`: an absolute path; the caller must check the file, since the runtime doesn't report whether
        it wrote it. Raises ModelError, or RuntimeLost, after which the runtime must not be used any more.
        """
        assert self._running is None
        assert max_new_tokens > 0
        running = Running(
            next(self._numbers),
            on_token,
            min(
                max_new_tokens,
                self.options.n_ctx if self.per_request_sampling else self.options.max_new_tokens,
            ),
            stops_itself=self.per_request_sampling or max_new_tokens >= self.options.max_new_tokens,
            has_perf=self.has_perf,
        )
        input_ = self._input(prompt)
        infer = self._infer_param(max_new_tokens, sampling, save_to, keep_history)
        self._running = running
        aborter = threading.Thread(target=self._abort_when_wanted, args=(running,), name="abort", daemon=True)
        aborter.start()
        try:
            self._library.run(self._opened(), input_, infer, running.number)
            if not running.finished.wait(FINISH_SECONDS):
                self._handle = None
                raise RuntimeLost("the NPU runtime has returned from a run without finishing it")
        finally:
            self._running = None
            running.finished.set()
            running.abort_now.set()
            aborter.join()
        return self._outcome(running)

    def _outcome(self, running: Running) -> Run:
        self._aborted_early = running.aborted_early
        if running.error is not None:
            raise running.error
        if running.failed:
            raise ModelError("the NPU runtime failed while it evaluated the prompt or the answer")
        return running.result()

    def _opened(self) -> c_void_p:
        if self._handle is None:
            raise ModelError("the model isn't loaded any more")
        return self._handle

    def _input(self, prompt: str) -> Any:
        try:
            data = prompt.encode()
        except UnicodeEncodeError as error:
            raise ModelError("the prompt has characters that UTF-8 can't have") from error
        if b"\0" in data:
            raise ModelError("the prompt has a NUL character, where the NPU runtime would end it")
        input_ = self._layout.input(input_type=INPUT_PROMPT)
        if self.has_perf:
            input_.role, input_.enable_thinking = b"user", False
        input_.content.prompt_input = data
        return input_

    def _infer_param(self, max_new_tokens: int, sampling: Sampling, save_to: str | None, keep: int) -> Any:
        infer = self._layout.infer_param(mode=MODE_GENERATE, keep_history=keep)
        if save_to is not None:
            assert Path(save_to).is_absolute()
            infer.prompt_cache_params = pointer(PromptCacheParam(1, os.fsencode(save_to)))
        if self.per_request_sampling:
            infer.sampling_params = pointer(SamplingParam(**sampling_fields(sampling)))
            infer.max_new_tokens = max_new_tokens
        return infer

    def _on_result(self, result: Any, userdata: int | None, state: int) -> int:
        """Ignores late callbacks of an earlier run."""
        running = self._running
        if running is not None and userdata in (None, running.number):
            running.tell(result, state)
        # 0: continue. Another value would not stop the run.
        return 0

    def _abort_when_wanted(self, running: Running) -> None:
        """Runs on a thread of its own, because a callback must not abort."""
        while running.abort_now.wait():
            running.abort_now.clear()
            if running.finished.is_set():
                return
            self._library.abort(self._opened())

    def abort(self) -> None:
        """Ends the current run once its prefill is done. Callable from any thread, at any time."""
        running = self._running
        if running is not None:
            running.abort()

    def load_cache(self, path: str) -> None:
        """Loads a state in place of the loaded one. Raises ModelError if the runtime refuses it; none is
        loaded then."""
        self.release_cache()
        if self._aborted_early:
            self._load_again()
        self._library.load_cache(self._opened(), str(Path(path).absolute()))
        self._cache_loaded = True

    def trust_abort(self) -> None:
        """Lets the next state be loaded without reloading the model, even after an early abort, to find out
        whether that crashes here."""
        self._aborted_early = False

    def _load_again(self) -> None:
        self.close()
        self._load()
        self._aborted_early = False

    def release_cache(self) -> None:
        """Releases the loaded state, if any. Raises ModelError."""
        if self._cache_loaded:
            self._cache_loaded = False
            self._library.release_cache(self._opened())

    def clear(self) -> None:
        """Clears the memory of the last run. Raises ModelError."""
        self._library.clear(self._opened())

    def close(self) -> None:
        """Frees the model. May be called twice. Raises ModelError."""
        handle, self._handle, self._cache_loaded = self._handle, None, False
        if handle is not None:
            self._library.destroy(handle)
