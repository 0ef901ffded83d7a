"""Encoded rows as a person wants to see them: text with what is trained, lengths, packing."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from swiftmeg.data.encoded.packing import pack
from swiftmeg.data.template.template import IGNORE

_COLOURS = ("\x1b[2m", "\x1b[1;32m", "\x1b[0m")
_BRACKETS = ("", "⟦", "⟧")


def marked_text(tokenizer: Any, row: dict[str, Any], colour: bool) -> str:
    """Decode a row of `input_ids` and `labels`, with trained tokens in green, or in ⟦brackets⟧.

    Behind those whose weight in the loss is not 1 it stands as a factor.
    """
    pieces = []
    ids, labels = (np.asarray(row[name]).tolist() for name in ("input_ids", "labels"))
    weights = np.asarray(row.get("loss_scale", np.ones(len(ids)))).tolist()
    tokens = [
        (token, label != IGNORE, weight if label != IGNORE else 1.0)
        for token, label, weight in zip(ids, labels, weights, strict=True)
    ]
    for (trained, weight), run in groupby(tokens, key=lambda token: token[1:]):
        text = tokenizer.decode([token for token, *_ in run])
        if colour:
            text = _COLOURS[trained] + text + _COLOURS[2]
        elif trained:
            text = _BRACKETS[1] + text + _BRACKETS[2]
        pieces.append(text if weight == 1 else f"{text}\u00d7{weight:g}")
    return "".join(pieces)


def trained_share(row: dict[str, Sequence[int]]) -> float:
    """The share of a row's tokens that is trained."""
    return float(np.mean(np.asarray(row["labels"]) != IGNORE))


def report(
    lengths: np.ndarray[Any, Any], trained: np.ndarray[Any, Any], max_length: int
) -> Iterator[str]:
    """Yield lines on `lengths` and `trained` tokens of rows, and on packs of `max_length`."""
    total = int(lengths.sum())
    share = trained / lengths
    yield f"rows: {len(lengths):,}; tokens: {total:,}"
    yield (
        f"trained: {int(trained.sum()):,} tokens, {trained.sum() / total:.1%} of all; of a row's "
        f"tokens {share.min():.1%} to {share.max():.1%}, mean {share.mean():.1%}"
    )
    quantiles = np.quantile(lengths, [0, 0.25, 0.5, 0.75, 0.95, 0.99, 1]).astype(int).tolist()
    names = ("shortest", "25%", "half", "75%", "95%", "99%", "longest")
    listed = ", ".join(f"{name} {value:,}" for name, value in zip(names, quantiles, strict=True))
    yield f"tokens of a row: mean {lengths.mean():,.1f}; {listed}"
    if quantiles[-1] <= max_length:
        packs = len(pack(lengths.tolist(), max_length))
        yield (
            f"packed to {max_length:,} tokens: {packs:,} packs, filled to "
            f"{total / (packs * max_length):.2%}"
        )


def draw_lengths(lengths: np.ndarray[Any, Any], path: Path) -> None:
    """Write a histogram of `lengths` as PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    axes.hist(lengths, bins=min(60, max(10, int(lengths.max() - lengths.min()) + 1)))
    axes.set(xlabel="tokens of a row", ylabel="rows")
    axes.axvline(lengths.mean(), color="tab:red", label=f"mean {lengths.mean():,.0f}")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
