"""Chat templates that `--template` offers by name, for tokenizers that bring none or a wrong one.

Each is the plain form of its family. ChatML and its kin write tools as Hermes and Qwen2.5 do, the
others have none. Names follow the model families' own.
"""

# ruff: noqa: RUF001 - DeepSeek writes its tokens with full-width bars.

from dataclasses import dataclass
from pathlib import Path

from swiftmeg.errors import UserError

GENERATION = "generation"


@dataclass(frozen=True)
class ChatTemplate:
    """Jinja text, the added tokens that it relies on, and the system prompt used by default."""

    jinja: str
    tokens: tuple[str, ...] = ()
    system: str | None = None


_CHATML = ChatTemplate(
    jinja=(
        "{%- if tools -%}"
        "{{ '<|im_start|>system\\n' }}"
        "{%- if messages[0].role == 'system' -%}{{ messages[0].content + '\\n\\n' }}{%- endif -%}"
        "{{ '# Tools\\n\\nYou may call one or more functions' }}"
        "{{ ' to assist with the user query.\\n\\n' }}"
        "{{ 'You are provided with function signatures within <tools></tools> XML tags:\\n' }}"
        "{{ '<tools>' }}"
        "{%- for tool in tools -%}{{ '\\n' + tool | tojson }}{%- endfor -%}"
        "{{ '\\n</tools>\\n\\nFor each function call, return a json object' }}"
        "{{ ' with function name and arguments within <tool_call></tool_call> XML tags:\\n' }}"
        "{{ '<tool_call>\\n' }}"
        '{{ \'{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>\' }}'
        "{{ '<|im_end|>\\n' }}"
        "{%- endif -%}"
        "{%- for message in messages -%}"
        "{%- if message.role == 'tool' -%}"
        "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}"
        "{{ '<|im_start|>user' }}{%- endif -%}"
        "{{ '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}"
        "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}"
        "{{ '<|im_end|>\\n' }}{%- endif -%}"
        "{%- elif message.tool_calls -%}"
        "{{ '<|im_start|>' + message.role }}"
        "{%- if message.content -%}{{ '\\n' + message.content }}{%- endif -%}"
        "{%- for call in message.tool_calls -%}"
        '{{ \'\\n<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
        "{{ call.function.arguments | tojson + '}\\n</tool_call>' }}"
        "{%- endfor -%}"
        "{{ '<|im_end|>\\n' }}"
        "{%- elif not (tools and loop.first and message.role == 'system') -%}"
        "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
        "{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
    ),
    tokens=("<|im_start|>", "<|im_end|>"),
)

_LLAMA3 = ChatTemplate(
    jinja=(
        "{{- bos_token -}}"
        "{%- for message in messages -%}"
        "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}"
        "{{- message.content | trim }}{{ '<|eot_id|>' }}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
        "{%- endif -%}"
    ),
    tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)

_GEMMA = ChatTemplate(
    jinja=(
        "{{- bos_token -}}"
        "{%- set ns = namespace(system='') -%}"
        "{%- for message in messages -%}"
        "{%- if message.role == 'system' -%}"
        "{%- set ns.system = message.content | trim + '\\n\\n' -%}"
        "{%- else -%}"
        "{%- set role = 'model' if message.role == 'assistant' else message.role -%}"
        "{{ '<start_of_turn>' + role + '\\n' + ns.system }}"
        "{{- message.content | trim }}{{ '<end_of_turn>\\n' }}"
        "{%- set ns.system = '' -%}"
        "{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"
    ),
    tokens=("<start_of_turn>", "<end_of_turn>"),
)

# The tokenizer's own template of these models cuts the thinking out of every turn.
_DEEPSEEK_R1 = ChatTemplate(
    jinja=(
        "{{- bos_token -}}"
        "{%- for message in messages -%}"
        "{%- if message.role == 'system' -%}{{ message.content }}"
        "{%- elif message.role == 'assistant' -%}"
        "{{ '<｜Assistant｜>' + message.content + '<｜end▁of▁sentence｜>' }}"
        "{%- else -%}{{ '<｜User｜>' + message.content }}{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<｜Assistant｜>' }}{%- endif -%}"
    ),
    tokens=("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
)

CHAT_TEMPLATES: dict[str, ChatTemplate] = {
    "chatml": _CHATML,
    "qwen": ChatTemplate(_CHATML.jinja, _CHATML.tokens, "You are a helpful assistant."),
    "qwen2_5": ChatTemplate(
        _CHATML.jinja,
        _CHATML.tokens,
        "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    ),
    "llama3": _LLAMA3,
    "gemma": _GEMMA,
    "deepseek_r1": _DEEPSEEK_R1,
}

_IM = ("<|im_start|>",)
_DEEPSEEK = ("<｜User｜>", "<｜Assistant｜>")

UPSTREAM_NAMES: dict[str, tuple[str, ...]] = {
    "default": (),
    **dict.fromkeys(("qwen3", "qwen3_thinking", "qwq"), (*_IM, "think")),
    **dict.fromkeys(("qwen3_nothinking", "qwen3_coder", "qwen2_5_math", "qwq_preview"), _IM),
    **dict.fromkeys(
        ("mimo", "mimo_rl", "internlm2", "internlm3", "yi", "yi_coder", "marco_o1"), _IM
    ),
    **dict.fromkeys(("deepseek", "deepseek_v2", "deepseek_coder"), ("Assistant:",)),
    **dict.fromkeys(("deepseek_v2_5", "deepseek_v3", "deepseek_v3_1"), _DEEPSEEK),
    **dict.fromkeys(("glm4", "glm4_0414", "glm4_5", "glm4_z1_rumination"), ("[gMASK]",)),
    **dict.fromkeys(("llama", "mistral_nemo", "mistral_2501"), ("[INST]",)),
    **dict.fromkeys(("llama3_1", "llama3_2", "llama3_3", "longwriter_llama"), _LLAMA3.tokens),
    **dict.fromkeys(("gemma2", "gemma3_text"), ("<start_of_turn>",)),
    **dict.fromkeys(("moonlight", "kimi_k2"), ("<|im_user|>",)),
    "gpt_oss": ("<|channel|>",),
    "dots1": ("<|userprompt|>",),
    "ernie": ("<|begin_of_sentence|>",),
    "seed_oss": ("<seed:bos>",),
    "megrez": ("<|role_start|>",),
    "phi4": ("<|im_start|>",),
}
"""Megatron-SWIFT's names for what tokenizers bring themselves, with what their text must hold."""


def find_chat_template(name: str) -> ChatTemplate:
    """Return the template called `name`, or the content of a `.jinja` file.

    Raises UserError for an unknown name or a missing file.
    """
    if name.endswith(".jinja"):
        try:
            return ChatTemplate(Path(name).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"--template {name}: cannot be read ({error.strerror})") from None
    if name not in CHAT_TEMPLATES:
        known = ", ".join([*CHAT_TEMPLATES, GENERATION, *UPSTREAM_NAMES])
        raise UserError(
            f"--template {name}: unknown; accepted: {known}, or the path of a .jinja file; "
            "without --template the tokenizer's own chat template is used"
        )
    return CHAT_TEMPLATES[name]
