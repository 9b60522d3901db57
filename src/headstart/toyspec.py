"""The vocabulary that the toy model's tokenizer and engine share, and the syntax of its switches.

A toy model is named by a path such as `toy:template=fold,ms_per_token=2`. It needs no weights: its
tokens are bytes, some merged ones and control tokens; its prediction is a hash of the history.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

PREFIX = "toy:"
N_BYTES = 256
MERGES = (b"\n\n", b"  ", b"th", b"the", b"er", b"in", b"ing", b"us", b"def", b"\ndef")
BOS, START, END, EOS = (N_BYTES + len(MERGES) + i for i in range(4))
CONTROL = {"<s>": BOS, "<|im_start|>": START, "<|im_end|>": END, "</s>": EOS}
GAP = {"<|fim_prefix|>": EOS + 1, "<|fim_suffix|>": EOS + 2, "<|fim_middle|>": EOS + 3}
N_VOCAB = EOS + 1 + len(GAP)


@dataclass(frozen=True)
class ToySpec:
    """`load_ms` slows down loading, `ms_per_token` evaluation; `memory_mb` is the memory that it claims to
    need; `can_cut=0` behaves like a recurrent model; `crash=decode` kills the process by a signal at its
    first evaluation; `eos=0` never ends an answer by itself; `gap=1` has the tokens of texts with a gap;
    `weights` stands for the content of a weights file. The first `busy` measurements report a busy machine;
    with `attention=1` flash attention measures a fifth faster."""

    template: str = "chatml"
    load_ms: float = 0.0
    memory_mb: int = 0
    ms_per_token: float = 0.0
    can_cut: int = 1
    crash: str = ""
    ctx: int = 4096
    eos: int = 1
    gap: int = 0
    weights: str = "toy"
    busy: int = 0
    attention: int = 0

    @classmethod
    def parse(cls, path: str) -> ToySpec:
        """Raises ValueError for an unknown switch."""
        kinds = {name: type(default) for name, default in asdict(cls()).items()}
        values: dict[str, object] = {}
        for item in filter(None, path.removeprefix(PREFIX).split(",")):
            name, _, value = item.partition("=")
            if name not in kinds:
                raise ValueError(f"the toy model has no switch {name!r}")
            values[name] = kinds[name](value)
        return replace(cls(), **values)  # type: ignore[arg-type]
