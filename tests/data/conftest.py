"""Small real tokenizers, trained on the spot, and chat templates written for these tests."""

import os
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

os.environ["HF_HUB_OFFLINE"] = "1"

TEXT = [
    "You are a helpful assistant. Who are you? I am a model.",
    "user\nassistant\nsystem\ntool\nthe quick brown fox jumps over the lazy dog",
    "<think>\n\n</think>\n\nLet me think about it: one two three four five.",
    "你好,我是一个人工智能助手。 été naïve 🙂",
] * 4

TOKENS = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<think>", "</think>", "<|return|>", "<|user|>", "<|assistant|>"),
]

SYSTEM_DEFAULT = "You are a test."

CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}<|im_start|>system\n"
    + SYSTEM_DEFAULT
    + "<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

HEADERS = (  # as Llama 3: BOS, trimmed content
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

INSTRUCT = (  # as Llama 2: no generation prompt, the same token closes every turn
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}"
    "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)

SYSTEM_LAST = (  # the system prompt moves into the last user message: history is rewritten
    "{% if messages[0].role == 'system' %}"
    "{% set system = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% set users = rest | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in rest %}{% if m.role == 'assistant' %}{{ m.content + eos_token }}"
    "{% elif system and m == users[-1] %}[INST] {{ system + ' ' + m.content }} [/INST]"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)

NO_END = (  # as GLM: nothing closes a turn but the next turn's token
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

RETURNS = (  # as GPT-OSS: the last turn is closed by another token than the earlier ones
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% if loop.last and m.role == 'assistant' %}<|return|>{% else %}<|im_end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# As Qwen3: turns before the last query lose their thinking, the others always show a think block.
THINKING = (
    "{% set ns = namespace(query=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.query = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}"
    "{% set thought, answer = '', m.content %}"
    "{% if '</think>' in m.content %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set answer = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% endif %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.query %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ answer + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

THINKING_OPENED = THINKING.replace(
    "{{ '<|im_start|>assistant\n' }}{% endif %}",
    "{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
)

REORDERED = (  # shows the latest message first: no prefix of it is a prefix of the text
    "{% for m in messages | reverse %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TEMPLATES = {
    "chatml": CHATML,
    "headers": HEADERS,
    "instruct": INSTRUCT,
    "system_last": SYSTEM_LAST,
    "no_end": NO_END,
    "returns": RETURNS,
    "thinking": THINKING,
    "thinking_opened": THINKING_OPENED,
    "reordered": REORDERED,
}


@pytest.fixture(scope="session")
def templates():
    return SimpleNamespace(**TEMPLATES)


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # As Llama 3's, this one shortens the reported places of tokens by their white space.
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def _metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", *TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def backends():
    return {"byte_level": _byte_level().to_str(), "metaspace": _metaspace().to_str()}


@pytest.fixture
def make_tokenizer(backends):
    """make_tokenizer(chat_template, kind="byte_level", **options) -> tokenizer."""

    def make(chat_template, kind="byte_level", **options):
        names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", **options}
        if kind == "slow":
            names["additional_special_tokens"] = TOKENS
            tokenizer = ByT5Tokenizer(extra_ids=0, **names)
        else:
            backend = Tokenizer.from_str(backends[kind])
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
        tokenizer.chat_template = chat_template
        return tokenizer

    return make


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SWIFTMEG_CACHE", str(tmp_path / "cache"))
