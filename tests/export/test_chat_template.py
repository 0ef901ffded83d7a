"""transformers asks an exported folder as the model was trained."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from swiftmeg.data.template.template import Template
from swiftmeg.export.chat_template import OTHERS, TEMPLATE, with_system, write_chat_template
from swiftmeg.export.hf_writer import copy_model_files
from swiftmeg.models.hf import read_model
from tests.ranks import run_ranks
from tests.tiny import CHAT_TEMPLATE, save_model

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "looks",
            "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
        },
    }
]
ASK = [{"role": "user", "content": "what?"}]
CHATS = {
    "plain": ASK,
    "system": [{"role": "system", "content": "Be brief."}, *ASK],
    "turns": [*ASK, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "why?"}],
}
SYSTEMS = [None, "Be good.", "It's {{ 'x' }} {% if %} \\ \"q\"\n\nzwei é 😀"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return read_model(str(save_model(tmp_path_factory.mktemp("m") / "llama", "llama")))


def exported(model: Any, folder: Path, template: str | None, system: str | None) -> Any:
    folder.mkdir()
    copy_model_files(model.folder, folder, torch.float32, {})
    args = SimpleNamespace(template=template, system=system, use_chat_template=None)
    write_chat_template(folder, model, args)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("system", SYSTEMS, ids=["none", "short", "marks"])
@pytest.mark.parametrize("template", [None, "chatml", "own.jinja"])
def test_the_prompt_is_the_trained_one(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, system: str
) -> None:
    monkeypatch.chdir(tmp_path)
    own = "\n{{ tools | tojson if tools else '' }}" + CHAT_TEMPLATE.replace("im_end|>", "im_end|>!")
    Path("own.jinja").write_text(own)
    tokenizer = exported(model, tmp_path / "out", template, system)
    trained = Template(model.tokenizer(), name=template, system=system)
    for messages in CHATS.values():
        for tools in (None, TOOLS) if template else (None,):
            expected = trained.encode_prompt(messages, json.dumps(tools) if tools else None)
            found = tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=True, return_dict=False
            )
            assert found == expected


def test_the_bases_template_is_kept_under_a_name(model: Any, tmp_path: Path) -> None:
    tokenizer = exported(model, tmp_path / "out", "chatml", "Be good.")
    assert tokenizer.chat_template["base"] == CHAT_TEMPLATE
    base = model.tokenizer().apply_chat_template(ASK, tokenize=False)
    assert tokenizer.apply_chat_template(ASK, chat_template="base", tokenize=False) == base


def test_a_template_for_tools_does_not_take_the_trained_ones_place(
    model: Any, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    exported(model, source, None, None)
    (source / OTHERS).mkdir()
    (source / OTHERS / "tool_use.jinja").write_text("tools!")
    same = exported(read_model(str(source)), tmp_path / "same", None, None)
    assert same.chat_template["tool_use"] == "tools!"
    assert same.chat_template["default"] == CHAT_TEMPLATE
    other = exported(read_model(str(source)), tmp_path / "other", "chatml", None)
    assert set(other.chat_template) == {"default", "base", "base_tool_use"}
    assert "tools!" not in other.apply_chat_template(ASK, tools=TOOLS, tokenize=False)


def test_a_template_in_the_tokenizers_config_is_replaced(model: Any, tmp_path: Path) -> None:
    source = tmp_path / "source"
    exported(model, source, None, None)
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / TEMPLATE).unlink()
    config["chat_template"] = CHAT_TEMPLATE
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    exported(read_model(str(source)), tmp_path / "out", "chatml", "Be good.")
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written["chat_template"] == (tmp_path / "out" / TEMPLATE).read_text()
    assert "Be good." in written["chat_template"]


def test_without_a_system_prompt_a_template_stays_as_it_is() -> None:
    assert with_system(CHAT_TEMPLATE, None) == CHAT_TEMPLATE
    assert with_system(CHAT_TEMPLATE, "") == CHAT_TEMPLATE


@pytest.mark.parametrize("train_type", ["full", "lora"])
def test_a_runs_folders_are_asked_as_it_trained(
    model: Any, tmp_path: Path, train_type: str
) -> None:
    row = {"messages": [*ASK, {"role": "assistant", "content": "yes"}]}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 4)
    flags = {"model": model.folder, "dataset": tmp_path / "rows.jsonl", "save": tmp_path / "out"}
    flags |= {"train_iters": 1, "global_batch_size": 2, "num_workers": 0, "add_version": "false"}
    flags |= {"save_safetensors": "true", "template": "chatml", "system": "Be good."}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    run_ranks(1, _train, [*words, "--train_type", train_type])
    folder = tmp_path / "out" / "iter_0000001-hf"
    trained = Template(model.tokenizer(), name="chatml", system="Be good.").encode_prompt(ASK)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = tokenizer.apply_chat_template(ASK, add_generation_prompt=True, return_dict=False)
    assert asked == trained
    saved = json.loads((folder / "args.json").read_text())
    assert (saved["template"], saved["system"]) == ("chatml", "Be good.")


def _train(argv: list[str]) -> None:
    from swiftmeg.cli.sft import main

    main(argv)
