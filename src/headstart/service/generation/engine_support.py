"""Checks for parameters that the model's engine doesn't have."""

from __future__ import annotations

from collections.abc import Collection

from headstart.errors import BadRequest
from headstart.protocol import ModelInfo, Sampling
from headstart.service.interface.text import check_tokens
from headstart.service.models.tenant_model import TenantModel


def check(model: TenantModel, given: Collection[str], *, because: str | None = None) -> None:
    """Raises BadRequest if the engine lacks one of the `given` parameters, or ModelLoading. `because`: the
    request's parameter that requires them, to be named in the error."""
    for lacking in model.info.lacks:
        if lacking in given:
            name = because or lacking
            raise BadRequest(
                f"{name} is not available with {model.name!r}, which the NPU's runtime runs; leave it out.",
                param=name,
            )


def overridden(info: ModelInfo, sampling: Sampling, given: Collection[str]) -> list[str]:
    """The `given` sampling parameters that differ from those fixed for all requests."""
    fixed = info.sampling
    if fixed is None:
        return []
    names = (name for name in Sampling.__struct_fields__ if name in given)
    return [name for name in names if getattr(sampling, name) != getattr(fixed, name)]


def refusal(model: TenantModel, names: list[str]) -> BadRequest:
    """The error for these parameters; the caller raises it."""
    return BadRequest(f"{warning(model.info, names)} Leave it out, or ask for just that.", param=names[0])


def warning(info: ModelInfo, names: list[str]) -> str:
    values = ", ".join(f"{name} = {getattr(info.sampling, name):g}" for name in names)
    return f"This NPU runtime samples all requests alike, with {values} here."


def check_bias(model: TenantModel, bias: dict[int, float]) -> None:
    """Raises BadRequest for a token that the model doesn't have."""
    check_tokens(model.vocabulary, list(bias), param="logit_bias")
