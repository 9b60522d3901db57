"""The schemas of each route's answers."""

from __future__ import annotations

from headstart.api.anthropic import schema as messages
from headstart.api.caches import schema as caches
from headstart.api.completions import schema as generation
from headstart.api.fields.reply import Answer
from headstart.api.models import schema as models
from headstart.api.responses import schema as responses
from headstart.api.tokens import schema as tokens

# Keyed by method and path.
ANSWERS = {
    ("post", "/v1/chat/completions"): Answer(generation.ChatCompletion, generation.ChatChunk),
    ("post", "/v1/completions"): Answer(generation.TextCompletion, generation.TextChunk),
    ("post", "/v1/responses"): Answer(responses.Response, responses.ResponseEvent, done=None),
    ("get", "/v1/responses/{response_id}"): Answer(responses.Response),
    ("delete", "/v1/responses/{response_id}"): Answer(responses.ResponseDeleted),
    ("post", "/v1/messages"): Answer(
        messages.Message, messages.MessageEvent, done=None, error=messages.AnthropicErrorReply
    ),
    ("post", "/v1/messages/count_tokens"): Answer(messages.TokenCount, error=messages.AnthropicErrorReply),
    ("post", "/v1/embeddings"): Answer(tokens.Embeddings),
    ("post", "/tokenize"): Answer(tokens.Tokens),
    ("post", "/detokenize"): Answer(tokens.Detokenized),
    ("post", "/apply-template"): Answer(tokens.Prompt),
    ("get", "/v1/models"): Answer(models.ModelList),
    ("get", "/v1/models/available"): Answer(models.ModelList),
    ("get", "/v1/models/loaded"): Answer(models.ModelList),
    ("get", "/v1/models/{name}"): Answer(models.Model),
    ("post", "/v1/models/load"): Answer(models.Model),
    ("post", "/v1/models/unload"): Answer(models.Unloaded),
    ("get", "/health"): Answer(models.Health),
    ("get", "/v1/cache"): Answer(caches.AllCaches),
    ("post", "/v1/cache/{model}"): Answer(caches.CacheMade, caches.CacheEvent),
    ("get", "/v1/cache/{model}"): Answer(caches.CacheList),
    ("get", "/v1/cache/{model}/{name}"): Answer(caches.CacheDetails),
    ("patch", "/v1/cache/{model}/{name}"): Answer(caches.Cache),
    ("delete", "/v1/cache/{model}/{name}"): Answer(caches.CacheDeleted),
    ("get", "/v1/cache/{model}/{name}/file"): Answer(None),
    ("put", "/v1/cache/{model}/{name}/file"): Answer(caches.CacheMade),
    ("post", "/v1/verify"): Answer(caches.Verification, caches.VerificationEvent),
}
