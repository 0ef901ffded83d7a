"""A chat in the terminal, or over a pipe."""

import sys
from collections.abc import Callable

from swiftmeg.data.standard_row import RowError
from swiftmeg.data.turns import Message
from swiftmeg.inference.engine import Engine
from swiftmeg.inference.results import ResultFile

HELP = """\
exit or quit  leave (so does the end of the input)
clear         forget the conversation
reset-system  forget it and ask for another system message (empty: the default one)
multi-line    let a query go over several lines, the last of which ends with #
single-line   let every line be a query
tool:TEXT     answer the model's tool call with TEXT
"""

RULE = "-" * 50
_TOOL = "tool:"


def chat(engine: Engine, results: ResultFile, stream: bool) -> None:
    """Answer what is read from standard input until it ends or says exit.

    Every turn is added to `results`. Without a chat template each query stands alone.
    """
    if sys.stdin.isatty():
        print(HELP + RULE)
    history: list[Message] = []
    read: Callable[[str], str] = _read_line
    while True:
        try:
            query = read("<<< ")
            command = query.strip().lower()
            if command in ("exit", "quit"):
                return
            if command == "reset-system":
                system = _read_line("<<<[system] ").strip()
                history = [{"role": "system", "content": system}] if system else []
                continue
        except EOFError:
            print()
            return
        if command == "clear":
            history = [message for message in history if message["role"] == "system"]
        elif command == "multi-line":
            read = _read_lines
        elif command == "single-line":
            read = _read_line
        elif command:
            turn = _answer(engine, results, stream, [*history, _message(query)])
            if engine.template.chat is not None:
                history += turn


def _answer(
    engine: Engine, results: ResultFile, stream: bool, messages: list[Message]
) -> list[Message]:
    """Print the answer; return the query and it, or nothing if there is none."""
    try:
        prompt = engine.prompt(messages)
    except RowError as error:
        print(f"{error}\n{RULE}")
        return []
    if stream:
        response = engine.stream(prompt, lambda piece: print(piece, end="", flush=True))
        print()
    else:
        (response,) = engine.answer([prompt])
        print(response)
    print(RULE)
    results.add(messages, response)
    return [messages[-1], {"role": "assistant", "content": response}]


def _message(query: str) -> Message:
    if query.startswith(_TOOL):
        return {"role": "tool", "content": query.removeprefix(_TOOL)}
    return {"role": "user", "content": query}


def _read_line(prompt: str) -> str:
    line = input(prompt)
    if not sys.stdin.isatty():
        print(line)  # no terminal has echoed it
    return line


def _read_lines(prompt: str) -> str:
    """Read up to a line that ends with #; commands work on a line of their own."""
    lines = [_read_line("<<<[multi-line] ")]
    commands = ("exit", "quit", "clear", "reset-system", "multi-line", "single-line")
    if lines[0].strip().lower() in commands:
        return lines[0]
    while not lines[-1].rstrip().endswith("#"):
        lines.append(_read_line(""))
    lines[-1] = lines[-1].rstrip().removesuffix("#")
    return "\n".join(lines)
