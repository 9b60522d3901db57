"""The ModelInfo of the NPU engine, and the request parameters that it lacks."""

from __future__ import annotations

from headstart.engine.rkllm.runtime import Runtime
from headstart.engine.rkllm.sampling import UNSUPPORTED
from headstart.protocol import ModelInfo

LACKS = [
    *UNSUPPORTED,
    *("n", "best_of", "logprobs", "top_logprobs", "logit_bias"),
    *("response_format", "structured_outputs", "grammar", "ignore_eos"),
]


def info_of(runtime: Runtime) -> ModelInfo:
    options = runtime.options
    return ModelInfo(
        n_ctx=options.n_ctx,
        slots=1,
        can_cut=True,
        engine=f"rkllm {runtime.version} ({runtime.abi})",
        settings={"ctx": str(options.n_ctx)},
        takes_text=True,
        state_files=True,
        counts_reuse=runtime.has_perf,
        lacks=LACKS,
        sampling=None if runtime.per_request_sampling else options.sampling,
    )
