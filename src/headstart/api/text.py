"""Text in request bodies."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator


def _encodable(text: str) -> str:
    # JSON can write half a surrogate pair, which is no text and can't be tokenised.
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("Input should be valid Unicode") from None
    return text


Utf8 = Annotated[str, AfterValidator(_encodable)]
