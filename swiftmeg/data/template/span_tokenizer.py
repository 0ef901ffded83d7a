"""Text to token ids with the place of each token in the text."""

import hashlib
import json
import os
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

Array = np.ndarray[Any, Any]
Span = tuple[int, int]


class SpanTokenizer:
    """Tokenises text of which some spans are to be told apart.

    A fast tokenizer sees the whole text at once and reports each token's place. Where it would
    join the end of a prompt with the beginning of a span in one token, which cannot happen when
    the model generates the span, it gets the pieces between the spans' borders one by one; so does
    a slow tokenizer, which reports no places.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._fast: Tokenizer | None = None
        # Rows are shared out to processes; a tokenizer that has used threads complains of forks.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        if getattr(tokenizer, "is_fast", False):
            fast = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            fast.no_truncation()
            fast.no_padding()
            # Post-processors add special tokens, which the text already holds, and may trim white
            # space from the places, which would move a header's end into the turn behind it.
            fast.post_processor = None
            self._fast = fast
        self._bytes = _token_bytes(self._fast)
        self._longest = int(self._bytes.max()) if self._bytes is not None else 0

    def at_least(self, text: str) -> int:
        """Return how many tokens `text` has at the very least, without tokenising it.

        0 for tokenizers of which that cannot be told.
        """
        if self._bytes is None:
            return 0
        # NFC, the only normalisation then, makes one character of up to three.
        return -(-len(text.encode("utf-8")) // (4 * self._longest))

    def ids(self, text: str) -> list[int]:
        """Return the token ids of `text`; no special token is added."""
        if self._fast is not None:
            return self._fast_ids(text)
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def ids_and_spans(
        self, texts: Sequence[str], spans: Sequence[list[Span]]
    ) -> list[tuple[Array, list[Span]]]:
        """Return for each text its token ids (int32) and, for each of its ordered spans of
        characters, the span of tokens that begin inside it."""
        if self._fast is None:
            return [self._by_pieces(*each) for each in zip(texts, spans, strict=True)]
        # Reporting the places of tokens takes the tokenizer longer than to tell them from lengths.
        encode = self._fast.encode_batch if self._bytes is None else self._fast.encode_batch_fast
        encodings = encode(list(texts), add_special_tokens=False)
        return [
            self._locate(encoding, text, wanted)
            for encoding, text, wanted in zip(encodings, texts, spans, strict=True)
        ]

    def _locate(self, encoding: Any, text: str, spans: list[Span]) -> tuple[Array, list[Span]]:
        assert self._fast is not None
        ids = np.array(encoding.ids, dtype=np.int32)
        if self._bytes is not None:
            found = _by_bytes(ids, text, spans, self._bytes)
            if found is not None:
                return ids, found
            encoding = self._fast.encode(text, add_special_tokens=False)
        found = _by_places(encoding, text, spans)
        return (ids, found) if found is not None else self._by_pieces(text, spans)

    def _fast_ids(self, text: str) -> list[int]:
        assert self._fast is not None
        (encoding,) = self._fast.encode_batch_fast([text], add_special_tokens=False)
        return list(encoding.ids)

    def _by_pieces(self, text: str, spans: list[Span]) -> tuple[Array, list[Span]]:
        ids: list[int] = []
        found = []
        at = 0
        for start, end in spans:
            ids += self.ids(text[at:start]) if start > at else []
            inside = self.ids(text[start:end]) if end > start else []
            found.append((len(ids), len(ids) + len(inside)))
            ids += inside
            at = end
        ids += self.ids(text[at:]) if at < len(text) else []
        return np.array(ids, dtype=np.int32), found

    def fingerprint(self) -> str:
        """Return a hash of the vocabulary and all that decides how text becomes ids."""
        if self._fast is not None:
            text = self._fast.to_str()
        else:
            vocabulary = sorted(self._tokenizer.get_vocab().items())
            special = self._tokenizer.special_tokens_map
            text = json.dumps([type(self._tokenizer).__name__, vocabulary, str(special)])
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _by_bytes(ids: Array, text: str, spans: list[Span], token_bytes: Array) -> list[Span] | None:
    """Tell the spans of tokens from the tokens' lengths.

    None where that does not work: normalisation changed the text, or a token joins the end of a
    prompt with the beginning of a span.
    """
    ends = token_bytes[ids].cumsum()
    whole = text.isascii()
    if (ends[-1] if len(ids) else 0) != (len(text) if whole else len(text.encode("utf-8"))):
        return None
    if not (whole or unicodedata.is_normalized("NFC", text)):
        return None
    found = []
    for start, end in spans:
        if not whole:
            start, end = (len(text[:place].encode("utf-8")) for place in (start, end))
        # Tokens 0 .. first-1 end at `start` or before it.
        first = int(ends.searchsorted(start, side="right"))
        if start and (not first or ends[first - 1] != start):
            return None
        # A token belongs to the span in which it begins.
        last = int(ends.searchsorted(end, side="left")) + 1 if end > start else first
        found.append((first, last))
    return found


def _by_places(encoding: Any, text: str, spans: list[Span]) -> list[Span] | None:
    """Look up the spans of tokens in the places that the tokenizer reports.

    None if a token joins the end of a prompt with the beginning of a span.
    """
    count, found = len(encoding.ids), []
    for start, end in spans:
        first, last = _token_at(encoding, start, len(text)), _token_at(encoding, end, len(text))
        if first is None or last is None or (first < count and _begin(encoding, first) < start):
            return None
        # The token at the end may begin inside the span, as a turn's last one together with the
        # text behind it.
        found.append((first, last + (last < count and _begin(encoding, last) < end)))
    return found


def _token_at(encoding: Any, place: int, length: int) -> int | None:
    """The first token that covers the character at `place`, or None if none does."""
    if place >= length:
        return len(encoding.ids)
    token: int | None = encoding.char_to_token(place)
    return token


def _begin(encoding: Any, token: int) -> int:
    return int(encoding.token_to_chars(token)[0])


def _token_bytes(fast: Tokenizer | None) -> Array | None:
    """Bytes of text that each token stands for (int64 [vocabulary]), or None where that may differ
    from place to place."""
    if fast is None:
        return None
    parts = json.loads(fast.to_str())
    steps = parts["pre_tokenizer"] or {}
    byte_level = any(
        step["type"] == "ByteLevel" for step in [steps, *steps.get("pretokenizers", [])] if step
    )
    swallows = any(token["lstrip"] or token["rstrip"] for token in parts["added_tokens"])
    normalizer = (parts["normalizer"] or {}).get("type")
    if not byte_level or swallows or normalizer not in (None, "NFC"):
        return None
    vocabulary = fast.get_vocab(with_added_tokens=True)
    lengths = np.zeros(max(vocabulary.values(), default=0) + 1, dtype=np.int64)
    for text, token in fast.get_vocab(with_added_tokens=False).items():
        lengths[token] = len(text)  # of byte-level vocabularies, each character is a byte
    for added in parts["added_tokens"]:
        lengths[added["id"]] = len(added["content"].encode("utf-8"))
    return lengths
