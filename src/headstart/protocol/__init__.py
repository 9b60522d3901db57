"""The messages between the server and a model's worker process: frozen structs.

The engine handles token ids and paths; text crosses only for an engine whose runtime requires it. A request
is one `Submit`, answered by any number of `Progress` and `Token` events and exactly one terminal event,
`Finished` or `Failed`, also after `Cancel`; or one `Embed`, answered by `Vector` events and `Embedded` or
`Failed`; or one `Forget`, answered by `Forgotten`.
"""

from headstart.protocol.commands import (
    Begin,
    Cancel,
    Command,
    Embed,
    Forget,
    SaveTo,
    SetStateLimits,
    StateRef,
    Submit,
)
from headstart.protocol.events import (
    Embedded,
    Failed,
    FailureKind,
    Finished,
    Forgotten,
    LoadFailed,
    ModelInfo,
    Progress,
    Ready,
    RequestEvent,
    SequenceEnd,
    Source,
    Stats,
    Step,
    StoreReport,
    Token,
    Vector,
    WorkerMessage,
)
from headstart.protocol.settings import (
    EngineSettings,
    RkllmSettings,
    Sampling,
    StateSettings,
)

__all__ = [
    "Begin",
    "Cancel",
    "Command",
    "Embed",
    "Embedded",
    "EngineSettings",
    "Failed",
    "FailureKind",
    "Finished",
    "Forget",
    "Forgotten",
    "LoadFailed",
    "ModelInfo",
    "Progress",
    "Ready",
    "RequestEvent",
    "RkllmSettings",
    "Sampling",
    "SaveTo",
    "SequenceEnd",
    "SetStateLimits",
    "Source",
    "StateRef",
    "StateSettings",
    "Stats",
    "Step",
    "StoreReport",
    "Submit",
    "Token",
    "Vector",
    "WorkerMessage",
]
