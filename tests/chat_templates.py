"""Chat templates of many families with tokenizers that have their control tokens: TRL's copies, and others in their manner."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Any

from transformers import PreTrainedTokenizerFast

from conftest import build_tokenizer

MISTRAL = (
    "{%- set system = messages[0].content if messages[0].role == 'system' %}"
    "{%- set turns = messages[1:] if system else messages %}"
    "{%- set asked = turns | selectattr('role', 'equalto', 'user') | list %}"
    "{{- bos_token }}{%- for m in turns %}"
    "{%- if m.role == 'user' %}"
    "{%- if tools is not none and m == asked[-1] %}"
    "{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif %}"
    "{{- '[INST] ' + ((system + '\n\n') if system and loop.last else '') + m.content + '[/INST]' }}"
    "{%- elif m.tool_calls %}{{- '[TOOL_CALLS] [' }}"
    "{%- for c in m.tool_calls %}{{- {'name': c.function.name, 'arguments': c.function.arguments, 'id': c.id} | tojson }}"
    "{%- if not loop.last %}{{- ', ' }}{%- endif %}{%- endfor %}{{- ']' + eos_token }}"
    "{%- elif m.role == 'assistant' %}{{- ' ' + m.content | trim + eos_token }}"
    "{%- elif m.role == 'tool' %}"
    """{{- '[TOOL_RESULTS] {"content": ' + m.content + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}"""
    "{%- else %}{{- raise_exception('Only user, assistant and tool roles are supported') }}{%- endif %}{%- endfor %}"
)
"""As of version 3: tools stand before the last question, the system's text in it, and there is no generation prompt."""
SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OLMO = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '<|system|>\n' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'assistant' %}{% if not loop.last %}"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token + '\n' }}{% else %}"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}{% endif %}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
OWN = {"mistral": (MISTRAL, "</s>"), "smollm": (SMOLLM, "<|im_end|>"), "olmo": (OLMO, "<|endoftext|>")}

_ENDS = ("<|im_end|>", "<end_of_turn>", "<turn|>", "<|eot_id|>", "<|return|>", "<|END_OF_TURN_TOKEN|>", "<|endoftext|>")
_DEEPSEEK = "<\uff5cend\u2581of\u2581sentence\uff5c>"
_TOKEN = re.compile(r"<\|?[a-z_\"A-Z0-9]+\|?>|<\|[^|>\s]+\|>|<\uff5c[^\uff5c>]+\uff5c>|</?(?:tool_call|think|s)>|\[/?[A-Z_]+\]")


def source(name: str) -> str:
    """A template's text."""
    return OWN[name][0] if name in OWN else (files("trl") / "chat_templates" / f"{name}.jinja").read_text()


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """The tiny byte-level tokenizer with a template and its control tokens."""
    text = source(name)
    control = sorted(set(_TOKEN.findall(text)))
    end = OWN[name][1] if name in OWN else next((e for e in (*_ENDS, _DEEPSEEK) if e in control), "</s>")
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"eos_token": end, "additional_special_tokens": control})
    tokenizer.chat_template = text
    tokenizer.model_max_length = 1 << 20
    return tokenizer


def user(text: str) -> dict[str, Any]:
    """A user's turn."""
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    """An assistant's turn."""
    return {"role": "assistant", "content": text, **more}


def result(text: str) -> dict[str, Any]:
    """What a call gave."""
    return {"role": "tool", "content": text, "name": "weather", "tool_call_id": "abc123def"}


CALL = {"type": "function", "id": "abc123def", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
_CITY = {"type": "object", "properties": {"city": {"type": "string", "description": "Where."}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Tells the weather.", "parameters": _CITY}}
