"""Embeddings: from texts or their tokens, through the engine, to vectors."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

from headstart.errors import BadRequest, HeadstartError, InputTooLong
from headstart.protocol import Embed, Vector
from headstart.service.generation.tokenize import tokenised
from headstart.service.interface.observer import ABANDONED, Failure, InputsEmbedded, Observer, Submitted
from headstart.service.interface.text import check_tokens
from headstart.service.models.tenant_model import TenantModel

Input = str | list[int]


async def input_tokens(model: TenantModel, inputs: Sequence[Input]) -> list[list[int]]:
    """The tokens of each input. Raises BadRequest, naming the first input that can't be embedded, or
    ModelLoading."""
    texts = iter(await tokenised(model, [text for text in inputs if isinstance(text, str)]))
    tokens = [next(texts) if isinstance(given, str) else given for given in inputs]
    most = model.info.embedding_tokens
    for index, of_input in enumerate(tokens):
        if not of_input or not inputs[index]:
            raise BadRequest(f"Input {index} is empty.", param="input")
        if len(of_input) > most:
            raise InputTooLong(len(of_input), most, index=index)
        check_tokens(model.vocabulary, of_input, param="input")
    return tokens


def check_dimensions(model: TenantModel, dimensions: int | None) -> None:
    """Raises BadRequest if the model has no embeddings or none with these dimensions, or ModelLoading."""
    size = model.info.embedding_size
    if not size:
        raise BadRequest(f"Model {model.name!r} ranks texts; it makes no embeddings.", param="model")
    if dimensions not in (None, size):
        raise BadRequest(
            f"The embeddings of {model.name!r} have {size} dimensions; leave dimensions out.",
            param="dimensions",
        )


async def embed(
    model: TenantModel, inputs: list[list[int]], observer: Observer
) -> AsyncGenerator[bytes, None]:
    """The vector of each input, in order: float32, little-endian, of length 1. Closing it early cancels the
    work. Raises Unavailable or EngineError."""
    observer.submitted(Submitted(model.name, model.owner, "embeddings"))
    try:
        with model.engine.submit(Embed(0, inputs)) as running:
            async for event in running:
                if isinstance(event, Vector):
                    yield event.values
    except (HeadstartError, *ABANDONED) as error:
        observer.failed(Failure("embed", model.name, error, owner=model.owner))
        raise
    observer.embedded(InputsEmbedded(model.name, model.owner, len(inputs), sum(map(len, inputs))))
