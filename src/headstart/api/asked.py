"""Which parameters of a request ask for something: an engine that doesn't have one must say so."""

from __future__ import annotations

from pydantic import BaseModel

# What clients send though they want nothing by it, besides null.
NOTHING: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "min_p": (0.0,),
    "grammar": ("",),
    "ignore_eos": (False,),
}


def asked(body: BaseModel) -> frozenset[str]:
    """Their names."""
    fields = type(body).model_fields
    return frozenset(
        (name in fields and fields[name].alias) or name
        for name in body.model_fields_set
        if _asks(name, getattr(body, name))
    )


def _asks(name: str, value: object) -> bool:
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_unset=True)
    # 0 == False, but a number of logprobs is no flag.
    return value is not None and not any(
        value == nothing and type(value) is type(nothing) for nothing in NOTHING.get(name, ())
    )
