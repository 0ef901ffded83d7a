"""Text to token ids with the place of each token in the text."""

import hashlib
import json
import unicodedata
from typing import Any

import numpy as np
from tokenizers import Tokenizer

Array = np.ndarray[Any, np.dtype[np.int64]]


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
        self, text: str, spans: list[tuple[int, int]]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Return token ids and, for each of the ordered `spans` of characters, the span of tokens
        that begin inside it."""
        if self._fast is None:
            return self._by_pieces(text, spans)
        if self._bytes is not None:
            quick = self._by_bytes(text, spans, self._bytes)
            if quick is not None:
                return quick
        encoding = self._fast.encode(text, add_special_tokens=False)
        ids = list(encoding.ids)
        found = []
        for start, end in spans:
            first, last = _token_at(encoding, start, len(text)), _token_at(encoding, end, len(text))
            if (
                first is None
                or last is None
                or (first < len(ids) and _begin(encoding, first) < start)
            ):
                return self._by_pieces(text, spans)
            # The token at the end may begin inside the span, as a turn's last one together with
            # the text behind it.
            found.append((first, last + (last < len(ids) and _begin(encoding, last) < end)))
        return ids, found

    def _fast_ids(self, text: str) -> list[int]:
        assert self._fast is not None
        (encoding,) = self._fast.encode_batch_fast([text], add_special_tokens=False)
        return list(encoding.ids)

    def _by_bytes(
        self, text: str, spans: list[tuple[int, int]], token_bytes: Array
    ) -> tuple[list[int], list[tuple[int, int]]] | None:
        """Tell the places from the tokens' lengths, which is faster than to have them reported.

        None where that does not work: normalisation changed the text, or a token joins the end of
        a prompt with the beginning of a span.
        """
        ids = self._fast_ids(text)
        ends = token_bytes[ids].cumsum()
        whole = text.isascii()
        if (ends[-1] if ids else 0) != (len(text) if whole else len(text.encode("utf-8"))):
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
        return ids, found

    def _by_pieces(
        self, text: str, spans: list[tuple[int, int]]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        ids: list[int] = []
        found = []
        at = 0
        for start, end in spans:
            ids += self.ids(text[at:start]) if start > at else []
            inside = self.ids(text[start:end]) if end > start else []
            found.append((len(ids), len(ids) + len(inside)))
            ids += inside
            at = end
        return ids + (self.ids(text[at:]) if at < len(text) else []), found

    def fingerprint(self) -> str:
        """Return a hash of the vocabulary and all that decides how text becomes ids."""
        if self._fast is not None:
            text = self._fast.to_str()
        else:
            vocabulary = sorted(self._tokenizer.get_vocab().items())
            special = self._tokenizer.special_tokens_map
            text = json.dumps([type(self._tokenizer).__name__, vocabulary, str(special)])
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


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
