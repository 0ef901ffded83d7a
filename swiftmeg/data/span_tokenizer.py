"""Text to token ids with the place of each token in the text."""

import hashlib
import json
from typing import Any

from tokenizers import Tokenizer


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
        self._bytes_per_token = _bytes_per_token(self._fast)

    def at_least(self, text: str) -> int:
        """Return how many tokens `text` has at the very least, without tokenising it.

        0 for tokenizers of which that cannot be told.
        """
        if self._bytes_per_token is None:
            return 0
        return -(-len(text.encode("utf-8")) // self._bytes_per_token)

    def ids(self, text: str) -> list[int]:
        """Return the token ids of `text`; no special token is added."""
        if self._fast is not None:
            return list(self._fast.encode(text, add_special_tokens=False).ids)
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def ids_and_mask(self, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """Return token ids and, for each, whether it begins inside one of the ordered `spans`."""
        if self._fast is None:
            return self._by_pieces(text, spans)
        encoding = self._fast.encode(text, add_special_tokens=False)
        mask, index = [], 0
        for begin, end in encoding.offsets:
            while index < len(spans) and begin >= spans[index][1]:
                index += 1
            inside = index < len(spans) and begin >= spans[index][0]
            if not inside and index < len(spans) and end > spans[index][0]:
                return self._by_pieces(text, spans)
            mask.append(inside)
        return list(encoding.ids), mask

    def _by_pieces(self, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        mask: list[bool] = []
        at = 0
        for start, end in [*spans, (len(text), len(text))]:
            for piece, inside in ((text[at:start], False), (text[start:end], True)):
                piece_ids = self.ids(piece) if piece else []
                ids += piece_ids
                mask += [inside] * len(piece_ids)
            at = end
        return ids, mask

    def fingerprint(self) -> str:
        """Return a hash of the vocabulary and all that decides how text becomes ids."""
        if self._fast is not None:
            text = self._fast.to_str()
        else:
            vocabulary = sorted(self._tokenizer.get_vocab().items())
            special = self._tokenizer.special_tokens_map
            text = json.dumps([type(self._tokenizer).__name__, vocabulary, str(special)])
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _bytes_per_token(fast: Tokenizer | None) -> int | None:
    """Bytes of the longest token, or None where a token may stand for any number of bytes."""
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
    # Of byte-level vocabularies, each character is a byte; those of added tokens may be more.
    longest = max(map(len, fast.get_vocab(with_added_tokens=False)), default=1)
    longest = max([longest, *(len(token["content"].encode()) for token in parts["added_tokens"])])
    return 4 * longest if normalizer else longest  # NFC makes one character of up to three
