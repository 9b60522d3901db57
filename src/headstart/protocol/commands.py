"""Messages to a worker."""

from __future__ import annotations

from msgspec import Struct

from headstart.protocol.settings import EngineSettings, Sampling


class StateRef(Struct, frozen=True):
    """The place of a verified state: `nbytes` at `offset` of the file at `path`, computed from `n_tokens`
    tokens. `identity` is that of the verified file: (device, inode, size, mtime in ns); the engine refuses a
    file with another."""

    path: str
    offset: int
    nbytes: int
    n_tokens: int
    identity: tuple[int, int, int, int]


class SaveTo(Struct, frozen=True):
    """The place to write a state to: `offset` of the file at `path`, which must exist."""

    path: str
    offset: int = 0


class Begin(Struct, frozen=True, tag=True):
    """The first message, sent once: a worker is started before it is known whether and how to load the
    model."""

    settings: EngineSettings


class Submit(Struct, frozen=True, tag=True):
    """One sequence: prefill `tokens`, then generate up to `max_tokens`, or save the state.

    `n`: the number of answers, at most the number of slots. Each is as if it were a request of its own; their
    ids count up from `id`, their seeds from `seed`. The prompt is prefilled once for all of them; until then,
    cancelling one cancels all.

    `boundary`: the position where prefill is cut, so that the values don't depend on whether the first
    `boundary` tokens were computed or restored; 0 for none, below the number of tokens unless nothing is
    generated. At most `boundary` tokens of the state in `restore` are used. `shared`: `restore` is the state
    of another prefix, which has that many tokens in common with this one; it is used up to a place where both
    are cut, if the model can cut states at all. None: it is this prefix's own state. `reuse=False`: every
    token is evaluated. A saved state was prefilled, whatever was decoded before.

    `owner`: the owner of the request. The state of another owner is shared for the first `public` tokens
    only, since everybody may know that these were computed.

    `to_disk`: what the request computes may be kept on the disk, too.

    `text`: the text of `tokens`, if the engine needs it (`ModelInfo.takes_text`). `progress`: report prefill
    from its start on, if the engine sees it; for `save_to` chunks are reported in any case.
    """

    id: int
    tokens: list[int]
    boundary: int = 0
    max_tokens: int = 0
    sampling: Sampling = Sampling()
    restore: StateRef | None = None
    shared: int | None = None
    save_to: SaveTo | None = None
    reuse: bool = True
    owner: str = ""
    public: int = 0
    n: int = 1
    text: str = ""
    progress: bool = False
    to_disk: bool = True


class Embed(Struct, frozen=True, tag=True):
    """Requests the embedding of each input; an input has from 1 to `embedding_tokens` tokens."""

    id: int
    inputs: list[list[int]]


class Cancel(Struct, frozen=True, tag=True):
    id: int


class SetStateLimits(Struct, frozen=True, tag=True):
    """New limits of the state store, as in StateSettings."""

    memory_bytes: int
    disk_bytes: int


class Forget(Struct, frozen=True, tag=True):
    """Requests that the states of a prompt and of everything that continues it be removed, wherever they are;
    answered by Forgotten. `owner`: whose; None: of all owners. `tokens`: the prompt; None: every prompt.
    `kept`: prompts whose common prefix with it stays."""

    id: int
    owner: str | None = None
    tokens: list[int] | None = None
    kept: list[list[int]] = []


Command = Begin | Submit | Embed | Cancel | SetStateLimits | Forget
