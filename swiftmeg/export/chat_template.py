"""A training run's chat template and system prompt, written where transformers looks for them.

A model whose tokenizer kept the base's template would be asked otherwise than it was trained, and
nothing would say so.
"""

import json
import shutil
from pathlib import Path
from typing import Protocol

from swiftmeg.data.template.chat_renderer import ChatRenderer
from swiftmeg.data.template.chat_templates import GENERATION
from swiftmeg.data.template.template_options import read_system
from swiftmeg.json_files import read_object
from swiftmeg.models.hf import HFModel

TEMPLATE = "chat_template.jinja"
"""The tokenizer's own template."""

OTHERS = "additional_chat_templates"
"""Templates that are asked for by their names, a file each."""

_CONFIG = "tokenizer_config.json"


class Prompting(Protocol):
    """The arguments that say how conversations become prompts."""

    template: str | None
    system: str | None
    use_chat_template: bool | None


def write_chat_template(folder: Path, model: HFModel, args: Prompting) -> None:
    """Make the template of `args` that of a folder with the tokenizer's files of `model`.

    transformers' `apply_chat_template` then gives the prompt that was trained, system prompt and
    tools included. The tokenizer's own template stays beside it as `base`.
    """
    given = args.template is not None or args.system is not None
    if not given or args.use_chat_template is False or args.template == GENERATION:
        if (model.folder / OTHERS).is_dir():
            shutil.copytree(model.folder / OTHERS, folder / OTHERS, dirs_exist_ok=True)
        return
    tokenizer = model.tokenizer()
    chat = ChatRenderer(tokenizer, args.template).chat
    base = tokenizer.chat_template
    before = base if isinstance(base, dict) else {"default": base} if base else {}
    jinja = with_system(chat.jinja, read_system(args.system) or chat.system)
    (folder / TEMPLATE).write_text(jinja, encoding="utf-8")
    _set_in_config(folder / _CONFIG, jinja)
    shutil.rmtree(folder / OTHERS, ignore_errors=True)
    for name, text in before.items():
        # Under its old name, one for tools would be taken wherever there are tools.
        kept = "base" if name == "default" else f"base_{name}"
        if text != jinja:
            (folder / OTHERS).mkdir(exist_ok=True)
            (folder / OTHERS / f"{kept}.jinja").write_text(text, encoding="utf-8")


def with_system(jinja: str, system: str | None) -> str:
    """The template with `system` for conversations that have no system message of their own."""
    if not system:
        return jinja
    text = system.encode("unicode_escape").decode("ascii").replace("'", "\\'")
    message = f"{{'role': 'system', 'content': '{text}'}}"
    lead = (
        "{%- if not messages or messages[0]['role'] != 'system' %}"
        f"{{%- set messages = [{message}] + messages %}}"
        "{%- endif %}"
    )
    # transformers takes a line break after a block away.
    return lead + ("\n" if jinja.startswith("\n") else "") + jinja


def _set_in_config(path: Path, jinja: str) -> None:
    """Readers that know the place of earlier releases find the same template there."""
    config = read_object(path) if path.is_file() else {}
    if "chat_template" in config:
        config["chat_template"] = jinja
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
