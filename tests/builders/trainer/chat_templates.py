"""Chat templates in the manner of several families, written for these tests, and tokenizers to go with them.

Each marks its answers and their stop token with `{% generation %}`; `unmarked` is the same template without the marks.
"""

import re
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

Chat = list[dict[str, Any]]

SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|>system\nBe of help.<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Tools with the system message, one call a turn, results quoted as JSON under another role's name.
LLAMA3 = (
    "{{ bos_token }}{% set sys = messages[0].content | trim if messages[0].role == 'system' else '' %}"
    "{% set rest = messages[1:] if messages[0].role == 'system' else messages %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday is a day.\n' }}"
    "{% if tools %}{% for t in tools %}{{ t | tojson(indent=4) + '\n\n' }}{% endfor %}{% endif %}{{ sys + '<|eot_id|>' }}"
    "{% for m in rest %}{% if m.role == 'tool' %}"
    "{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' + m.content | tojson + '<|eot_id|>' }}"
    "{% elif m.role == 'assistant' %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% generation %}"
    "{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('One call at once') }}{% endif %}"
    '{% set f = m.tool_calls[0].function %}{{ \'{"name": "\' + f.name + \'", "parameters": \' }}'
    "{{ f.arguments | tojson }}{{ '}<|eot_id|>' }}{% else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}"
    "{% endgeneration %}{% else %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Tools in the system message, calls in tags after the content, results of one round in one turn of the user.
_QWEN_HEAD = (
    "{% set sys = messages[0].content if messages[0].role == 'system' else 'You help.' %}"
    "{{ '<|im_start|>system\n' + sys }}{% if tools %}{{ '\n\n# Tools\n<tools>' }}{% for t in tools %}"
    "{{ '\n' + t | tojson }}{% endfor %}{{ '\n</tools>' }}{% endif %}{{ '<|im_end|>\n' }}"
)
_QWEN_TOOL = (
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
)
_QWEN_CALLS = (
    "{% for c in m.tool_calls or [] %}{% if m.content or not loop.first %}{{ '\n' }}{% endif %}"
    '{{ \'<tool_call>\n{"name": "\' + c.function.name + \'", "arguments": \' + c.function.arguments | tojson'
    " + '}\n</tool_call>' }}{% endfor %}"
)
_QWEN_TAIL = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
QWEN25 = (
    _QWEN_HEAD
    + "{% for m in messages %}{% if m.role == 'tool' %}"
    + _QWEN_TOOL
    + "{% elif m.role == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' }}{% generation %}{{ m.content }}" + _QWEN_CALLS + "{{ '<|im_end|>' }}"
    "{% endgeneration %}{{ '\n' }}{% elif m.role == 'user' or not loop.first %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}" + _QWEN_TAIL
)
# Reasoning stays only after the last question; the last answer always has a think block, if an empty one.
QWEN3 = (
    _QWEN_HEAD + "{% set ns = namespace(asked=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'tool' %}" + _QWEN_TOOL + "{% elif m.role == 'assistant' %}"
    "{% set content = m.content %}{% set why = m.reasoning_content or '' %}{% if '</think>' in content %}"
    "{% set why = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}{% generation %}"
    "{% if loop.index0 > ns.asked and (loop.last or why) %}"
    "{{ '<think>\n' + why.strip('\n') + '\n</think>\n\n' }}{% endif %}{{ content }}"
    + _QWEN_CALLS
    + "{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% elif m.role == 'user' or not loop.first %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# No generation prompt; system message and tools come before the last question.
MISTRAL = (
    "{% set sys = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% set rest = messages[1:] if messages[0].role == 'system' else messages %}"
    "{% set ns = namespace(last=-1, turn=0) %}{% for m in rest %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{{ bos_token }}{% for m in rest %}"
    "{% if (m.role == 'user' or (m.role == 'assistant' and not m.tool_calls)) %}"
    "{% if (m.role == 'user') != (ns.turn % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% set ns.turn = ns.turn + 1 %}{% endif %}{% if m.role == 'user' %}"
    "{% if tools and loop.index0 == ns.last %}{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST] ' + (sys + '\n\n' if sys and loop.index0 == ns.last else '') + m.content + '[/INST]' }}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS] {\"content\": ' + m.content | tojson + '}[/TOOL_RESULTS]' }}"
    "{% elif m.tool_calls %}{% generation %}{{ '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}{{ c.function | tojson }}"
    "{% if not loop.last %}{{ ', ' }}{% endif %}{% endfor %}{{ ']' + eos_token }}{% endgeneration %}"
    "{% else %}{% generation %}{{ ' ' + m.content | trim + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
FAMILIES = {"smollm2": SMOLLM2, "llama3": LLAMA3, "qwen2.5": QWEN25, "qwen3": QWEN3, "mistral": MISTRAL}
WITH_TOOLS = ("llama3", "qwen2.5", "qwen3", "mistral")
# Beginning and end of sequence, then the others.
SPECIALS = {
    "smollm2": ("<|im_start|>", "<|im_end|>"),
    "qwen2.5": ("<|im_start|>", "<|im_end|>"),
    "qwen3": ("<|im_start|>", "<|im_end|>"),
    "deepseek": ("<|begin|>", "<|end|>", "<|User|>", "<|Assistant|>", "<|Call|>", "<|Result|>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    "mistral": (
        *("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
        *("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    ),
}


def unmarked(template: str) -> str:
    """The template without its marks."""
    return re.sub(r"\{% (?:end)?generation %\}", "", template)


def byte_level_tokenizer(family: str, template: str) -> PreTrainedTokenizerFast:
    """Bytes, with a few merges, so that blanks join words as in real tokenizers; offsets count the blanks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: id_ for id_, token in enumerate([*SPECIALS[family], *alphabet])}
    merges = [("Ġ", "a"), ("Ġ", "b"), ("Ċ", "Ċ"), ("a", "b"), ("Ġ", "Ġ"), ("Ġ", "{"), ("}", "Ċ")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    return _fast(backend, family, template)


def byte_fallback_tokenizer(family: str, template: str) -> PreTrainedTokenizerFast:
    """As sentencepiece makes them: ▁ for blanks, letters, and bytes for all that is not in the vocabulary."""
    characters = ["▁", *map(chr, range(ord("!"), ord("~") + 1))]
    tokens = [*SPECIALS[family], "<unk>", *(f"<0x{n:02X}>" for n in range(256)), *characters]
    vocab = {token: id_ for id_, token in enumerate(tokens)}
    merges = [("▁", "a"), ("a", "b"), ("▁", "▁")]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _fast(backend, family, template)


def _fast(backend: Tokenizer, family: str, template: str) -> PreTrainedTokenizerFast:
    specials = SPECIALS[family]
    make: Any = PreTrainedTokenizerFast  # its constructor is not annotated
    tokenizer: PreTrainedTokenizerFast = make(
        tokenizer_object=backend,
        bos_token=specials[0],
        eos_token=specials[1],
        additional_special_tokens=list(specials[2:]),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


# The generation prompt opens the reasoning (Qwen3-Thinking-2507, Qwen3.5): the model writes what follows `<think>`.
THINKING = (
    unmarked(QWEN3)
    .replace(
        _QWEN_TAIL.removesuffix("{% endif %}"),
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}",
    )
    .replace("(loop.last or why)", "true")
)
# The same prompt, but only content is known, and reasoning is cut out of all answers but the last (QwQ).
THINKING_IN_CONTENT = (
    "{% for m in messages %}{% set c = m.content %}{% if m.role == 'assistant' and not loop.last %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + c + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
# The same prompt, and reasoning is cut out of every answer (DeepSeek-R1 and its distilled models). Arguments are text.
THINKING_NEVER_SHOWN = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "{{ '<|User|>' + m.content }}{% elif m.role == 'tool' %}{{ '<|Result|>' + m.content }}{% elif m.tool_calls %}"
    "{{ '<|Assistant|>' }}{% for c in m.tool_calls %}{{ '<|Call|>' + c['function']['name'] + '\n' + "
    "c['function']['arguments'] }}{% endfor %}{{ eos_token }}{% else %}{% set c = m.content %}{% if '</think>' in c %}"
    "{% set c = c.split('</think>')[-1] %}{% endif %}{{ '<|Assistant|>' + c + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
