"""From a request to the engine's input: its tokens, where prefill is cut, the state it starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any

import msgspec

from headstart.caches.entry import Entry, Form
from headstart.errors import BadRequest
from headstart.prompt.answer_parts import Parser, PlainText
from headstart.protocol import Submit
from headstart.service.caching.lookup import Start
from headstart.service.generation import engine_support
from headstart.service.generation.engine_support import check_bias
from headstart.service.generation.explain import Closest, closest, longest_match, texts_of
from headstart.service.generation.grammars import GrammarChecks
from headstart.service.generation.planner import PlannedPrompt, PromptPlanner
from headstart.service.generation.tool_calls import Reading, reading
from headstart.service.interface.chat import Chat
from headstart.service.interface.options import Options
from headstart.service.interface.text import Text
from headstart.service.models.tenant_model import TenantModel
from headstart.service.origins.conversations import Conversations

Json = dict[str, Any]
PARAMS: dict[Form, str] = {"chat": "messages", "completion": "prompt"}


@dataclass(frozen=True)
class Prepared:
    """A request ready for the engine. `parser` creates the parser of one answer, which reads the bytes that
    `piece` gives of each token. `matched`: the number of prompt tokens in the closest known state's prefix.
    `received`: when the request came, by the monotonic clock. `closest`: for an explanation, if one was
    requested. `warning`: how the answer differs from the request."""

    model: TenantModel
    submit: Submit
    options: Options
    plan: PlannedPrompt
    start: Start
    parser: Callable[[], Parser]
    piece: Callable[[int], bytes]
    received: float
    matched: int
    closest: Closest | None
    warning: str

    @property
    def names(self) -> Sequence[str]:
        """The caches that the request names."""
        return self.options.use_cache or ()


class Preparation:
    """Prepares requests. All methods raise BadRequest, CacheNotFound, CacheConflict, ContextLengthExceeded,
    StorageError or Unavailable."""

    def __init__(
        self,
        planner: PromptPlanner,
        conversations: Conversations,
        grammars: GrammarChecks,
    ) -> None:
        self.planner = planner
        self.store = planner.caching.store
        self.conversations = conversations
        self.grammars = grammars

    async def chat(
        self, model: TenantModel, messages: list[Json], options: Options, tools: list[Json] | None = None
    ) -> Prepared:
        received = monotonic()
        options = await self._with_grammar(model, options)
        if options.keep:
            self.conversations.check(model, options.keep.name, options.keep.overwrite)
        own = Chat(messages, tools or [], options.variables)
        plan = await self.planner.chat(model, own, options)
        warning = self._check(model, options, plan.tokens, "chat")
        assert plan.chat
        how = reading(model.vocabulary, plan.chat.tools, options.calling, plan.tokens)
        if how.grammar:
            engine_support.check(model, ["grammar"], because="tool_choice")
            await self.grammars.check(how.grammar, param="tools", owner=model.owner)
        texts = texts_of(plan.chat.messages) if options.explain else []
        near = await self._closest(model, plan, "chat", texts) if options.explain else None
        return self._prepared(model, options, plan, how, "chat", near, warning, received)

    async def _with_grammar(self, model: TenantModel, options: Options) -> Options:
        """The options with the requested grammar among the sampling parameters, once it was checked."""
        if options.grammar is None:
            return options
        await self.grammars.check(options.grammar.text, options.grammar.param, model.owner)
        calling = options.calling
        if calling.choice != "required":
            # The grammar covers the whole answer, even if the prompt ends with an open `<think>`.
            calling = replace(calling, reasoning=False)
        sampling = msgspec.structs.replace(options.sampling, grammar=options.grammar.text)
        return replace(options, sampling=sampling, calling=calling)

    async def count(
        self, model: TenantModel, messages: list[Json], options: Options, tools: list[Json] | None = None
    ) -> int:
        """The number of tokens in the prompt of such a chat."""
        own = Chat(messages, tools or [], options.variables)
        return await self.planner.count(model, own, options.use_cache)

    async def texts(self, model: TenantModel, prompts: Sequence[Text], options: Options) -> list[Prepared]:
        received = monotonic()
        options = await self._with_grammar(model, options)
        return [await self._text(model, prompt, options, received) for prompt in prompts]

    async def _text(self, model: TenantModel, prompt: Text, options: Options, received: float) -> Prepared:
        plan = await self.planner.text(model, prompt, options.use_cache)
        warning = self._check(model, options, plan.tokens, "completion")
        plain, near = Reading(model.vocabulary.piece, PlainText), None
        if options.explain:
            near = await self._closest(model, plan, "completion", [prompt.whole(model.vocabulary)])
        return self._prepared(model, options, plan, plain, "completion", near, warning, received)

    def _check(self, model: TenantModel, options: Options, tokens: list[int], form: Form) -> str:
        """A warning about parameters that are overridden, or "". Raises BadRequest for parameters that the
        engine lacks or the model can't have, or ContextLengthExceeded."""
        warning = self._check_parameters(model, options)
        if not tokens:
            raise BadRequest("The prompt is empty.", param=PARAMS[form])
        model.check_fits(len(tokens), param=PARAMS[form])
        check_bias(model, options.sampling.logit_bias)
        if options.n > model.info.slots:
            raise BadRequest(
                f"n = {options.n} is more than this model's {model.info.slots} slots: ask for fewer answers "
                "or start the server with more --slots.",
                param="n",
            )
        return warning

    def _check_parameters(self, model: TenantModel, options: Options) -> str:
        engine_support.check(model, options.given)
        if options.sampling.grammar:
            engine_support.check(model, ["grammar"])
        names = engine_support.overridden(model.info, options.sampling, options.given)
        if names and model.settings.rkllm_other_sampling == "refuse":
            raise engine_support.refusal(model, names)
        return engine_support.warning(model.info, names) if names else ""

    async def _closest(
        self, model: TenantModel, plan: PlannedPrompt, form: Form, texts: Sequence[str]
    ) -> Closest | None:
        visible = (entry for each in model.namespace.visible for entry in self.store.entries(each))
        known: Iterable[Entry] = [plan.entry] if plan.entry else visible
        return await closest(model, form, known, texts, plan.tokens)

    def _prepared(
        self,
        model: TenantModel,
        options: Options,
        plan: PlannedPrompt,
        how: Reading,
        form: Form,
        near: Closest | None,
        warning: str,
        received: float,
    ) -> Prepared:
        start = plan.start if options.reuse else Start(plan.start.boundary, miss="cache_prompt_false")
        matched = start.boundary
        if plan.entry is None:
            matched = longest_match(self.store.remembered(model.namespace, form), plan.tokens)
        return Prepared(
            model,
            _submit(model, options, plan, start, how.grammar, PARAMS[form]),
            options,
            plan,
            start,
            how.parser,
            how.piece,
            received,
            matched,
            near,
            warning,
        )


def _submit(
    model: TenantModel, options: Options, plan: PlannedPrompt, start: Start, grammar: str, param: str
) -> Submit:
    """The engine's request. `grammar`: that of the tools, "" for none."""
    tokens, sampling = plan.tokens, options.sampling
    entry = plan.entry or (plan.match and plan.match.entry)
    room = model.info.n_ctx - len(tokens)
    return Submit(
        id=0,
        tokens=tokens,
        boundary=start.boundary,
        max_tokens=room if options.max_tokens is None else min(options.max_tokens, room),
        sampling=msgspec.structs.replace(sampling, grammar=grammar) if grammar else sampling,
        restore=start.restore,
        shared=start.shared,
        reuse=options.reuse,
        owner=model.owner,
        public=start.boundary if entry and not entry.owner else 0,
        n=options.n,
        text=model.text(tokens, param=param),
        progress=options.progress,
        to_disk=options.to_disk and options.reuse,
    )
