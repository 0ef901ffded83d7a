"""Rows that are tokenised when they are asked for."""

import logging
from typing import Any

from torch.utils.data import Dataset

from swiftmeg.data.encoded.encode import check_rows
from swiftmeg.data.standard_row import RowError, RowTooLong
from swiftmeg.data.template.pairs import PairTemplate
from swiftmeg.data.template.template import Template
from swiftmeg.errors import UserError

logger = logging.getLogger(__name__)

TRIES = 10


class LazyDataset(Dataset[dict[str, Any]]):
    """Encoded rows, or pairs, of the standard rows `rows`, made by `template` at every access.

    In place of a row that the template cannot use comes the next that it can, of at most `TRIES`;
    the log names such rows. With `strict` it raises UserError, unless the row is merely too long.

    Where the tokenizer has tokens that the model lacks, making the dataset tokenises all rows once,
    with `num_proc` processes, and raises UserError for a row that has one.
    """

    def __init__(
        self,
        rows: Any,
        template: Template | PairTemplate,
        *,
        strict: bool = False,
        num_proc: int = 1,
    ) -> None:
        if template.may_exceed_vocabulary:
            logger.info(
                "--lazy_tokenize true: the tokenizer has tokens beyond the model's vocabulary of "
                "%d: looking for them in %d rows",
                *(template.vocab_size, len(rows)),
            )
            check_rows(rows, template, num_proc)
        self._rows = rows
        self._template = template
        self._strict = strict
        self._named = 0

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        for place in range(index, index + TRIES):
            row = self._rows[place % len(self._rows)]
            try:
                encoded = self._template.encode(row)
            except RowError as error:
                self._report(row["origin"], error)
            else:
                if "input_ids" not in encoded:
                    return encoded  # a pair, whose sides have it
                return {**encoded, "length": len(encoded["input_ids"])}
        raise UserError(
            f"--lazy_tokenize true: {TRIES} rows in a row cannot be used, the first of them "
            f"{self._rows[index]['origin']}: drop the flag to have all such rows counted"
        )

    def _report(self, origin: str, error: RowError) -> None:
        if self._strict and not isinstance(error, RowTooLong):
            raise UserError(f"--strict true: {origin}: {error}")
        if self._named < TRIES:
            self._named += 1
            logger.warning("%s: %s: the next row takes its place", origin, error)
