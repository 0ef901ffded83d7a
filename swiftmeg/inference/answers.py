"""Answers for the rows of a dataset."""

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import batched

from tqdm import tqdm

from swiftmeg.args.infer import InferArguments
from swiftmeg.data.sources.load import load_rows
from swiftmeg.data.standard_row import Drops, Row, RowError, messages_of
from swiftmeg.data.turns import Message
from swiftmeg.errors import UserError
from swiftmeg.inference.engine import Engine
from swiftmeg.inference.results import ResultFile

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """A conversation that waits for its answer, and the answer that the row expects, if any."""

    messages: list[Message]
    label: str | None
    prompt: list[int]


def read_rows(args: InferArguments) -> list[Row]:
    """Return the standard rows of --val_dataset, in the order in which they are answered.

    Raises UserError for whatever is wrong with the flags or the data.
    """
    rows, _ = load_rows(
        args.val_dataset,
        data_seed=args.data_seed,
        dataset_num_proc=args.dataset_num_proc,
        columns=args.columns,
        strict=args.strict,
        dataset_shuffle=args.val_dataset_shuffle,
        model_name=args.model_name,
        model_author=args.model_author,
        use_hf=args.use_hf,
        hub_token=args.hub_token,
        for_training=False,
    )
    wanted = len(rows) if args.val_dataset_sample is None else args.val_dataset_sample
    return list(rows.select(range(min(len(rows), wanted))))


def answer_rows(engine: Engine, rows: list[Row], results: ResultFile, args: InferArguments) -> None:
    """Add an answer for each row to `results`, then print how many, and --metric.

    A row that the template refuses, or that is longer than the model's context, is dropped and
    reported; with --strict it raises UserError.
    """
    drops = Drops()
    questions = _questions(engine, rows, drops, args.strict)
    answered = correct = labelled = 0
    with tqdm(total=len(rows), disable=bool(args.stream) or not sys.stderr.isatty()) as bar:
        for batch in batched(questions, args.max_batch_size):
            for question, response in zip(batch, _responses(engine, batch, args), strict=True):
                results.add(question.messages, response, question.label)
                answered += 1
                if question.label is not None:
                    labelled += 1
                    correct += response.strip() == question.label.strip()
            bar.update(answered + drops.total - bar.n)
    if not answered:
        raise UserError(f"--val_dataset: none of its {len(rows)} rows can be used: {drops}")
    print(f"{answered} rows answered, {drops.total} dropped: {results.path}")
    if drops.total:
        logger.warning("dropped: %s", drops)
    if args.metric == "acc":
        if not labelled:
            raise UserError("--metric acc: no row ends with an assistant turn to compare with")
        print(f"acc: {correct / labelled:.4f} ({correct} of {labelled})")


def _questions(engine: Engine, rows: list[Row], drops: Drops, strict: bool) -> Iterator[Question]:
    for row in rows:
        messages, label = messages_of(row), None
        if messages[-1]["role"] == "assistant":
            label = messages.pop()["content"]
        try:
            if not messages:
                raise RowError("nothing comes before the assistant's turn")
            prompt = engine.prompt(messages, row.get("tools"))
        except RowError as error:
            if strict:
                raise UserError(f"--strict true: {row['origin']}: {error}") from None
            drops.add(row["origin"], error)
            continue
        yield Question(messages, label, prompt)


def _responses(engine: Engine, batch: tuple[Question, ...], args: InferArguments) -> list[str]:
    if not args.stream:
        return engine.answer([question.prompt for question in batch])
    (question,) = batch
    print(f"<<< {question.messages[-1]['content']}")
    response = engine.stream(question.prompt, lambda piece: print(piece, end="", flush=True))
    print("\n" + "-" * 50)
    return [response]
