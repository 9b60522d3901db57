"""All errors that clients can receive.

    HeadstartError
    ├── BadRequest                 400  the request can't be served as it is
    │   ├── InvalidName            400  a cache name with forbidden characters or length
    │   ├── ContextLengthExceeded  400  prompt longer than the model's context
    │   │   └── InputTooLong       400  the same for an input of an embedding request
    │   ├── TextTooLong            400  a text beyond the limit for tokenising
    │   └── DamagedFile            400  the uploaded file is no valid cache file
    ├── Unauthorized               401  no API key that the server knows
    ├── AdminRequired              403  the operation affects other keys, and the API key is no admin
    ├── NotFound                   404
    │   ├── ModelNotFound          404
    │   ├── CacheNotFound          404
    │   └── ResponseNotFound       404  no response of this id is stored
    │       └── PreviousNotFound   404  the same for `previous_response_id`
    ├── MethodNotAllowed           405
    ├── CacheConflict              409  the named cache is being built, or may not be replaced
    │   └── CacheMismatch          409  the uploaded states have another fingerprint
    ├── ModelBusy                  409  the model is answering requests
    ├── RequestTimeout             408  the request came too slowly
    ├── BodyTooLarge               413
    ├── AddressTooLong             414
    ├── HeadersTooLarge            431
    ├── EngineError                500  the engine could not serve this one request
    ├── StorageError               500  the cache directory can't be read or written
    │   ├── StorageFull            507
    │   └── QuotaExceeded          507  the cache does not fit into its quota
    └── Unavailable                503  come back later
        ├── ModelLoading           503
        ├── OutOfMemory            503  there is no memory for one more model
        ├── Overloaded             503  the queue is full
        ├── EngineDied             503  the worker process ended; it is being restarted
        ├── PromptsDied            503  the prompt process ended; it is being restarted
        └── ShuttingDown           503  the server is being stopped

Each class carries its HTTP status, its OpenAI error type and its code; `headstart.api.errors` turns any of
them into the one JSON shape. `retry_after` is in seconds; `retryable=False` tells SDKs not to try again.
"""

from __future__ import annotations

from typing import Any


class HeadstartError(Exception):
    """Base of every error a client may see. `details` are added to the JSON error object. `is_logged`: the
    log has the line about its request already."""

    is_logged = False

    @property
    def log_code(self) -> str:
        """The error in one word, for the log: never the message, which may quote the request."""
        return self.code or self.type

    status = 500
    type = "server_error"
    code: str | None = None
    retry_after: int | None = None
    retryable = True

    def __init__(self, message: str, *, param: str | None = None, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.details = details


class BadRequest(HeadstartError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class InvalidName(BadRequest):
    code = "invalid_cache_name"


class ContextLengthExceeded(BadRequest):
    code = "context_length_exceeded"

    def __init__(self, n_prompt_tokens: int, n_ctx: int, *, param: str) -> None:
        super().__init__(
            f"The prompt has {n_prompt_tokens} tokens; the context of this model holds {n_ctx}, "
            "one of which must be left for the answer. Shorten the prompt or start the server with a "
            "larger --ctx.",
            param=param,
            n_prompt_tokens=n_prompt_tokens,
            n_ctx=n_ctx,
        )


class InputTooLong(ContextLengthExceeded):
    def __init__(self, n_prompt_tokens: int, n_ctx: int, *, index: int) -> None:
        BadRequest.__init__(
            self,
            f"Input {index} has {n_prompt_tokens} tokens; an embedding of this model is of {n_ctx} at most. "
            "Shorten it, or embed it in parts.",
            param="input",
            n_prompt_tokens=n_prompt_tokens,
            n_ctx=n_ctx,
        )


class TextTooLong(BadRequest):
    """The text is longer than any context allows, so its tokens aren't counted."""

    code = "context_length_exceeded"


class DamagedFile(BadRequest):
    code = "damaged_file"


class Unauthorized(HeadstartError):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class AdminRequired(HeadstartError):
    status = 403
    type = "invalid_request_error"
    code = "admin_required"
    retryable = False

    def __init__(self, what: str, *, param: str | None = None) -> None:
        super().__init__(
            f"{what} needs the API key of an admin: `admin = true` in the key's table of the server's "
            "configuration makes it one.",
            param=param,
        )


class NotFound(HeadstartError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class CacheNotFound(NotFound):
    code = "cache_not_found"


class ResponseNotFound(NotFound):
    code = "response_not_found"


class PreviousNotFound(ResponseNotFound):
    code = "previous_response_not_found"


class MethodNotAllowed(HeadstartError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class CacheConflict(HeadstartError):
    status = 409
    type = "invalid_request_error"
    code = "cache_conflict"
    retryable = False


class CacheMismatch(CacheConflict):
    code = "cache_mismatch"


class ModelBusy(HeadstartError):
    status = 409
    type = "invalid_request_error"
    code = "model_busy"
    retryable = False


class RequestTimeout(HeadstartError):
    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class BodyTooLarge(HeadstartError):
    status = 413
    type = "invalid_request_error"
    code = "body_too_large"


class AddressTooLong(HeadstartError):
    status = 414
    type = "invalid_request_error"
    code = "address_too_long"


class HeadersTooLarge(HeadstartError):
    status = 431
    type = "invalid_request_error"
    code = "headers_too_large"


class EngineError(HeadstartError):
    code = "engine_error"


class StorageError(HeadstartError):
    code = "storage_error"
    retryable = False


class StorageFull(StorageError):
    status = 507
    code = "storage_full"


class QuotaExceeded(StorageError):
    status = 507
    code = "quota_exceeded"


class Unavailable(HeadstartError):
    status = 503
    code = "unavailable"
    retry_after = 1


class ModelLoading(Unavailable):
    code = "model_loading"


class OutOfMemory(Unavailable):
    code = "out_of_memory"
    retry_after = 10


class Overloaded(Unavailable):
    code = "overloaded"


class EngineDied(Unavailable):
    code = "engine_died"


class PromptsDied(Unavailable):
    code = "prompts_died"


class ShuttingDown(Unavailable):
    code = "shutting_down"

    def __init__(self) -> None:
        super().__init__("The server is being stopped. Send the request again when it has been started.")


class StartupError(Exception):
    """The server can't start; the message says what to do. Shown on the terminal, never over HTTP."""
