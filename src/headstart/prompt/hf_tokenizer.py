"""Tokenizers of models whose own file can't be read, from the `tokenizer.json` next to it.

Prompts for such a model reach its runtime as text, which it tokenises again. So no token is added that the
text lacks, and a tokenizer whose tokens can't be turned back into their text is refused when loaded.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from collections.abc import Set as AbstractSet
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from headstart.errors import StartupError
from headstart.prompt.vocabulary import Prefixed, joined
from headstart.regular_files import read_text

SPACE = "\u2581"  # What SentencePiece writes for a space.
# The fill-in-the-middle tokens: before the text, before the text after the gap, and at the gap.
GAP = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
CONFIG, TEMPLATE, TOKENIZER = "tokenizer_config.json", "chat_template.jinja", "tokenizer.json"
# Words, white space, other alphabets, an emoji of several tokens, and a special token (in the braces).
PROBE = "Why? {}\n  It's  naïve: 1 + 23 = «二十四» 👩🏽‍💻\n\tend "


class HfTokenizer:
    """The tokenizer of the model file at `path`. `ends`: special tokens; a cached prefix ends with one of
    them, since text never merges across it. Raises StartupError, which names the missing or invalid file."""

    def __init__(self, path: str) -> None:
        folder = Path(path).parent
        self.backend = _backend(folder / TOKENIZER)
        config = _config(folder / CONFIG)
        self.template = _template(folder / TEMPLATE, config)
        self.bos_text = _token_text(config.get("bos_token"))
        self.eos_text = _token_text(config.get("eos_token"))
        added = self.backend.get_added_tokens_decoder()
        self.contents = {id_: token.content for id_, token in added.items()}
        self.added: Collection[int] = self.contents.keys()
        self.hidden = {id_ for id_, token in added.items() if token.special}
        self.ends: AbstractSet[int] = self.hidden
        texts = set(self.contents.values())
        self.gap: tuple[str, str, str] | None = GAP if texts.issuperset(GAP) else None
        self.pieces = dict(self._pieces())
        self.n_vocab = max(self.pieces, default=-1) + 1
        # Whether a space is added before text: only before the first, or before each that follows a token.
        self.prefixes: Prefixed = ""
        self.prefixes = self._prefixes()
        strips = any(token.lstrip or token.rstrip for token in added.values())
        self.specials = [] if strips or self.prefixes else list(self.contents.values())
        self._check_reversible(folder / TOKENIZER)

    def encode(self, text: str, first: bool = True, *, parse_special: bool = True) -> list[int]:
        backend = self.backend if parse_special else self._plain
        return list(backend.encode(text, add_special_tokens=False).ids)

    @cached_property
    def _plain(self) -> Backend:
        """A tokenizer that treats special tokens as text."""
        plain = Backend.from_str(self.backend.to_str())
        plain.encode_special_tokens = True
        return plain

    def piece(self, token: int) -> bytes:
        return b"" if token in self.hidden else self.written(token)

    def written(self, token: int) -> bytes:
        return self.pieces.get(token, b"")

    def text(self, tokens: Sequence[int]) -> str:
        """The text of these tokens."""
        return joined(tokens, self.written, self.prefixes, self.added)

    def _pieces(self) -> Iterator[tuple[int, bytes]]:
        around = json.loads(self.backend.to_str())
        by_bytes = "ByteLevel" in json.dumps([around["pre_tokenizer"], around["decoder"]])
        for text, id_ in self.backend.get_vocab(with_added_tokens=True).items():
            if id_ in self.contents:
                yield id_, self.contents[id_].encode()
            else:
                yield id_, _bytes_of(text) if by_bytes else _spaced(text)

    def _prefixes(self) -> Prefixed:
        if not self._begins_with_space("a"):
            return ""
        hidden_texts = [text for id_, text in self.contents.items() if id_ in self.hidden]
        return "each" if any(self._begins_with_space(f"{text}a", 1) for text in hidden_texts) else "first"

    def _begins_with_space(self, text: str, at: int = 0) -> bool:
        tokens = self.encode(text)
        return len(tokens) > at and self.written(tokens[at]).startswith(b" ")

    def _check_reversible(self, path: Path) -> None:
        hidden_texts = [text for id_, text in self.contents.items() if id_ in self.hidden]
        probe = PROBE.format(hidden_texts[0] if hidden_texts else "")
        tokens = self.encode(probe)
        if not tokens or self.encode(self.text(tokens)) != tokens:
            raise StartupError(
                f"{path} can't be used: its tokens can't be turned back into their text, which the NPU's "
                "runtime has to be given."
            )


def _backend(path: Path) -> Backend:
    if not path.is_file():
        raise StartupError(
            f"There is no {path}. A model for the NPU needs the tokenizer.json and tokenizer_config.json of "
            "the model that it was converted from, in the folder it is in."
        )
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # The library raises nothing more special.
        raise StartupError(f"{path} is no tokenizer: {error}") from error
    backend.no_padding()
    backend.no_truncation()
    return backend


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(read_text(path, follow=True))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise StartupError(f"{path} can't be read: {error}") from error
    if not isinstance(config, dict):
        raise StartupError(f"{path} can't be read: it is no JSON object")
    return config


def _template(path: Path, config: dict[str, Any]) -> str | None:
    """The model's chat template: in its own file, or in the configuration, possibly as one of several."""
    try:
        return read_text(path, follow=True)
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"{path} can't be read: {error}") from error
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _token_text(token: object) -> str:
    """The text of a token, which is given as a string or as an object with it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level vocabularies write for bytes, as in GPT-2: printable bytes as
    themselves, others as substitutes."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(0x100 + i): byte for i, byte in enumerate(rest)}


ALPHABET = _byte_alphabet()


def _bytes_of(text: str) -> bytes:
    try:
        return bytes(ALPHABET[character] for character in text)
    except KeyError:
        return text.encode()


def _spaced(text: str) -> bytes:
    """The bytes of a SentencePiece token; bytes without another token are tokens like <0x0A>."""
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return bytes([int(text[3:5], 16)])
        except ValueError:
            pass
    return text.replace(SPACE, " ").encode()
