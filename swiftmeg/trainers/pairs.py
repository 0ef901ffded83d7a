"""Preference pairs as training data: both sides of a pair are samples that follow one another."""

from typing import Any

from swiftmeg.data.collate import untrained
from swiftmeg.data.encoded.encode import encode_pairs
from swiftmeg.data.template.pairs import PairTemplate
from swiftmeg.models.hf import HFModel
from swiftmeg.trainers.data import Encoding, prepare_data
from swiftmeg.trainers.training_data import TrainingData

SIDES = ("chosen", "rejected")

SIDE_WEIGHT = 0.5
"""What a side counts for in the objective, which is a mean over pairs."""


def prepare_pairs(args: Any, model: HFModel) -> TrainingData:
    """Read and tokenise the pairs of --dataset and --val_dataset; needs no process group."""
    return prepare_data(args, model, PAIRS)


def untrained_pair(item: Any) -> dict[str, Any]:
    """A pair of sides that are not trained, in place of a pair or of a pack of pairs."""
    pair = item[0] if isinstance(item, list) else item
    return {side: untrained(pair[side]) for side in SIDES}


def _template(tokenizer: Any, args: Any, **options: Any) -> PairTemplate:
    return PairTemplate(tokenizer, ld_alpha=args.ld_alpha, **options)


PAIRS = Encoding(_template, encode_pairs, untrained_pair, SIDE_WEIGHT, sides=2)
