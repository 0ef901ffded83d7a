"""What the engine generates, against the model's own forward pass."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from swiftmeg.args.infer import InferArguments
from swiftmeg.data.standard_row import RowTooLong
from swiftmeg.errors import UserError
from swiftmeg.inference.engine import Engine

QUERIES = ["hi", "what is a longer question?", "x" * 40]


def _engine(folder: Path, **flags: object) -> Engine:
    return Engine(InferArguments(**{"temperature": 0.0, "max_new_tokens": 24} | flags), folder)


def _prompts(engine: Engine, queries: list[str] = QUERIES) -> list[list[int]]:
    return [engine.prompt([{"role": "user", "content": query}]) for query in queries]


def test_greedy_answer_takes_the_likeliest_token_each_time(folder: Path):
    engine = _engine(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for prompt in _prompts(engine):
        ids = list(prompt)
        for _ in range(24):
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if token == engine.tokenizer.eos_token_id:
                break
            ids.append(token)
        text = engine.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
        assert engine.answer([prompt]) == [text]


def test_a_batch_answers_as_its_rows_alone(folder: Path):
    engine = _engine(folder)
    prompts = _prompts(engine)
    alone = [engine.answer([prompt])[0] for prompt in prompts]
    assert engine.answer(prompts) == alone
    assert len(set(alone)) == len(alone)


def test_streamed_pieces_are_the_answer(folder: Path):
    engine = _engine(folder)
    for prompt in _prompts(engine):
        pieces: list[str] = []
        assert engine.stream(prompt, pieces.append) == "".join(pieces)
        assert engine.answer([prompt]) == ["".join(pieces)]


def test_stop_word_ends_the_answer_and_is_not_shown(folder: Path):
    plain = _engine(folder)
    (prompt,) = _prompts(plain, ["hi"])
    (answer,) = plain.answer([prompt])
    word = answer[5:8]
    engine = _engine(folder, stop_words=[word, "never said"])
    expected = answer[: answer.index(word)]
    pieces: list[str] = []
    assert engine.answer([prompt]) == [expected]
    assert engine.stream(prompt, pieces.append) == "".join(pieces) == expected


def test_the_template_s_end_of_turn_ends_an_answer(folder: Path):
    # The model never says its own end; the template's is one more.
    engine = _engine(folder)
    assert engine.tokenizer.convert_tokens_to_ids("<|im_end|>") in engine._stop_ids()
    engine.tokenizer.eos_token = "~"
    assert engine.tokenizer.convert_tokens_to_ids("<|im_end|>") in engine._stop_ids()


def test_answers_fill_the_context_and_longer_prompts_are_refused(folder: Path):
    engine = _engine(folder, max_new_tokens=None, stop_words=[])
    (prompt,) = _prompts(engine, ["hi"])
    assert engine._room(len(prompt)) == 128 - len(prompt)
    engine.answer([prompt])
    with pytest.raises(RowTooLong, match="context of 128 tokens"):
        _prompts(engine, ["x" * 128])


def test_response_prefix_starts_every_answer(folder: Path):
    engine = _engine(folder, response_prefix="<think>\\n")
    (prompt,) = _prompts(engine, ["hi"])
    assert engine.tokenizer.decode(prompt).endswith("<|im_start|>assistant\n<think>\n")
    assert engine.answer([prompt])[0].startswith("<think>\n")


def test_sampling_depends_on_the_seed_and_the_flags(folder: Path):
    flags = {"temperature": 1.0, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1}

    def answer(**changes: object) -> str:
        engine = _engine(folder, **flags | changes)
        return engine.answer(_prompts(engine, ["hi"]))[0]

    assert answer() == answer()
    assert answer(seed=1) != answer(seed=2)
    assert answer(top_k=1, repetition_penalty=None) == answer(
        temperature=0.0, repetition_penalty=None
    )


def test_unset_sampling_is_the_model_s_own(folder: Path, tmp_path: Path):
    engine = _engine(folder, temperature=None)
    assert not engine._config.do_sample
    shutil.copytree(folder, tmp_path / "sampling")
    (tmp_path / "sampling" / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 0.7, "top_k": 20}'
    )
    config = _engine(tmp_path / "sampling", temperature=None, top_k=5)._config
    assert (config.do_sample, config.temperature, config.top_k) == (True, 0.7, 5)


def test_beam_search_finds_no_less_likely_answer(folder: Path):
    engine = _engine(folder, num_beams=4, max_new_tokens=6)
    greedy = _engine(folder, max_new_tokens=6)
    prompts = _prompts(engine, ["hi"])
    assert len(engine.answer(prompts)[0]) > 0
    assert engine.answer(prompts) != greedy.answer(prompts)


def test_plain_text_is_continued_without_markup(folder: Path):
    engine = _engine(folder, use_chat_template=False)
    assert engine.tokenizer.decode(_prompts(engine, ["once upon"])[0]) == "once upon"


@pytest.mark.parametrize("harm", ["config", "weights", "truncated", "missing", "mcore"])
def test_ill_folders_are_one_clear_error(folder: Path, tmp_path: Path, harm: str):
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    weights = copy / "model.safetensors"
    if harm == "config":
        (copy / "config.json").write_text("{")
    elif harm == "weights":
        weights.unlink()
    elif harm == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif harm == "missing":
        tensors = load_file(weights)
        del tensors["model.norm.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    else:
        (copy / "config.json").unlink()
        (copy / "iter_0000001").mkdir()
    expected = {
        "config": "cannot be read",
        "missing": "model.norm.weight",
        "mcore": "swift export --to_hf",
    }
    with pytest.raises(UserError) as error:
        _engine(copy)
    assert expected.get(harm, "cannot be loaded") in str(error.value)
    assert str(copy) in str(error.value)
    assert "\n" not in str(error.value)
