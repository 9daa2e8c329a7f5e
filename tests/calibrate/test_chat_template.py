"""Chats -> text: transformers' rendering on templates like the published ones, forms of messages, hostile templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantkit.calibrate.chat_template import TemplateFailure, render_chats
from quantkit.calibrate.chats import ChatDocument, chat_document
from quantkit.errors import CalibrationError
from tests.calibrate.byte_checkpoint import BOS, EOS, rows_of, text_of, write, write_checkpoint

CHAT = [{"role": "user", "content": "hi"}]
SPECIAL_TOKENS = {"bos_token": BOS, "eos_token": EOS}

DEEPSEEK_LIKE = """{{ bos_token }}{% set ns = namespace(system='') %}
{%- for m in messages %}{% if m['role'] == 'system' %}{% set ns.system = m['content'] %}{% endif %}{% endfor %}
{{- ns.system }}
{%- for m in messages %}
    {%- if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}{% endif %}
    {%- if m['role'] == 'assistant' and m['tool_calls'] is defined %}
        {{- '<|Assistant|>' + (m['content'] or '') }}
        {%- for call in m['tool_calls'] %}
            {{- '<|call|>' + call['function']['name'] + '\\n```json\\n' + call['function']['arguments'] + '\\n```' }}
        {%- endfor %}
        {{- eos_token }}
    {%- elif m['role'] == 'assistant' %}
        {%- set content = m['content'] %}
        {%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
        {{- '<|Assistant|>' + content + eos_token }}
    {%- endif %}
    {%- if m['role'] == 'tool' %}{{ '<|output|>' + m['content'] }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"""
CHATML_LIKE = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
    {{- '# Tools\\n<tools>' }}
    {%- for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' and tools %}{% continue %}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- if message.reasoning_content %}{{ '<think>' + message.reasoning_content + '</think>\\n' }}{% endif %}
        {%- generation %}{{ message.content }}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function or call %}
            {{- '\\n<tool_call>{"name": "' + call.name + '", "arguments": ' }}
            {%- if call.arguments is string %}{{ call.arguments }}{% else %}{{ call.arguments | tojson }}{% endif %}
            {{- '}</tool_call>' }}
        {%- endfor %}
        {%- endgeneration %}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}"""
LLAMA_LIKE = """{{- bos_token }}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{% set date_string = 'today' %}{% endif %}
{%- endif %}
{%- for message in messages if message.role not in ['system'] %}
    {%- if loop.first and tools is not none %}
        {{- '<|header|>' + date_string + '\\nFunctions:\\n' }}
        {%- for t in tools %}
            {{- t | tojson(indent=4) }}{{ '\\n' }}{{ t | tojson(separators=(',', ':'), sort_keys=True) }}
        {%- endfor %}
    {%- endif %}
    {%- if 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}{{ raise_exception('one call at a time') }}{% endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}{{ '}' }}
    {%- elif message.role == 'tool' %}
        {{- '<|ipython|>' }}
        {%- if message.content is mapping or message.content is iterable %}{{ message.content | tojson }}{% endif %}
    {%- else %}
        {{- '<|' + message['role'] + '|>' }}
        {%- if message.content is string %}{{ message.content | trim }}
        {%- else %}
            {%- for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{% for document in documents or [] %}[{{ document.title }}: {{ document.text }}]
{% endfor %}"""
TEMPLATES = {"deepseek": DEEPSEEK_LIKE, "chatml": CHATML_LIKE, "llama": LLAMA_LIKE}

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Größe & <Wetter>",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def called(arguments: object, **content: object) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    return {"role": "assistant", **content, "tool_calls": [{"id": "1", "type": "function", "function": function}]}


SYSTEM = {"role": "system", "content": "Be short."}
QUESTION = {"role": "user", "content": "Wie wird's in Köln? "}
RESULT = {"role": "tool", "tool_call_id": "1", "content": '{"sky": "clear"}'}
ANSWER = {"role": "assistant", "content": "<think>hm</think>Clear.", "reasoning": "The tool says so."}
ROWS: dict[str, dict[str, Any]] = {
    "plain": {"messages": [SYSTEM, QUESTION, ANSWER]},
    "tools": {"messages": [SYSTEM, QUESTION, called({"city": "Köln"}, content=""), RESULT, ANSWER], "tools": [WEATHER]},
    "null": {"messages": [QUESTION, called({"city": "Köln"}, content=None), RESULT], "tools": [WEATHER]},
    "parts": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    },
    "documents": {"messages": [QUESTION], "documents": [{"title": "Almanac", "text": "It rains in Köln."}]},
    "variables": {"messages": [QUESTION], "tools": [WEATHER], "chat_template_kwargs": {"date_string": "3 May"}},
}
# Where a template cannot take the form that transformers gives it.
REFUSED_BY_TRANSFORMERS = {("deepseek", "tools"), ("deepseek", "null"), ("deepseek", "parts")}
PRINTS_PYTHON = {("chatml", "parts")}  # [{'type': 'text', ...


def render(template: str, row: dict[str, Any]) -> str:
    (text,) = render_chats({"default": template}, [chat_document("c.jsonl:1", row)], SPECIAL_TOKENS)
    return text


def by_transformers(template: str, row: dict[str, Any]) -> str:
    tokenization = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models

    tokenizer = tokenization.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), bos_token=BOS, eos_token=EOS, chat_template=template
    )
    text: str = tokenizer.apply_chat_template(
        row["messages"],
        tools=row.get("tools"),
        documents=row.get("documents"),
        tokenize=False,
        **row.get("chat_template_kwargs", {}),
    )
    return text


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(name: str, row: str) -> None:
    text = render(TEMPLATES[name], ROWS[row])
    if (name, row) in REFUSED_BY_TRANSFORMERS:
        with pytest.raises(TypeError):
            by_transformers(TEMPLATES[name], ROWS[row])
    elif (name, row) in PRINTS_PYTHON:
        assert "{'type'" in by_transformers(TEMPLATES[name], ROWS[row])
    else:
        assert text == by_transformers(TEMPLATES[name], ROWS[row])
    assert "{'" not in text


def test_tools_reach_the_text_as_objects_or_as_json_text() -> None:
    row = ROWS["tools"]
    text = render(CHATML_LIKE, row)
    assert json.dumps(WEATHER, ensure_ascii=False) in text
    assert render(CHATML_LIKE, row | {"tools": json.dumps([WEATHER])}) == text
    none = render(CHATML_LIKE, {"messages": row["messages"]})
    assert "# Tools" not in none
    for empty in (None, [], "", "[]"):
        assert render(CHATML_LIKE, row | {"tools": empty}) == none


@pytest.mark.parametrize("name", TEMPLATES)
def test_arguments_are_objects_or_json_text(name: str) -> None:
    """As vLLM does, JSON text becomes an object; a template that joins texts gets text."""
    texts = {
        render(TEMPLATES[name], {"messages": [QUESTION, called(arguments, content="")]})
        for arguments in ({"city": "Köln"}, '{"city": "Köln"}')
    }
    assert len(texts) == 1
    assert '{"city": "Köln"}' in texts.pop()
    for nothing in (None, "", {}):
        assert "{}" in render(TEMPLATES[name], {"messages": [QUESTION, called(nothing, content="")]})


def test_text_arguments_stay_what_they_were() -> None:
    assert '{"city":"Köln"}' in render(DEEPSEEK_LIKE, {"messages": [QUESTION, called('{"city":"Köln"}', content="")]})
    printed = "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments }}{% endfor %}{% endfor %}"
    assert render(printed, {"messages": [QUESTION, called({"city": "Köln"})]}) == '{"city": "Köln"}'


def test_null_content_in_the_form_that_shows_the_call() -> None:
    """transformers leaves the key out, vLLM gives "", and older DeepSeek templates ask whether it is none."""
    asks = (
        "{% for m in messages %}{% if m['content'] is none %}{{ m['tool_calls'][0]['function']['name'] }}"
        "{% else %}{{ '<' + m['content'] + '>' }}{% endif %}{% endfor %}"
    )
    assert render(asks, ROWS["null"]) == "<Wie wird's in Köln? >weather<" + RESULT["content"] + ">"
    joins = "{% for m in messages %}{{ m.content + '|' }}{% endfor %}"
    assert render(joins, {"messages": [{"role": "user", "content": "a"}, called({}, content=None)]}) == "a||"


def test_parts_are_joined_for_a_template_that_knows_text_alone() -> None:
    parts = [{"type": "text", "text": "one"}, "two"]
    row = {"messages": [{"role": "user", "content": parts}]}
    assert render(CHATML_LIKE, row) == "<|im_start|>user\none\ntwo<|im_end|>\n"
    assert render(LLAMA_LIKE, row) == BOS + "<|user|>onetwo"


def test_text_becomes_a_part_for_a_template_that_knows_parts_alone() -> None:
    template = "{% for m in messages %}{% for part in m.content %}{{ part.text }};{% endfor %}{% endfor %}"
    assert render(template, {"messages": CHAT}) == "hi;"


def test_a_chat_with_tools_takes_the_template_of_that_name(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain! "}, {"name": "tool_use", "template": "tools! "}]
    folder = write_checkpoint(tmp_path / "model", chat_template=named)
    lines = [{"messages": CHAT, "tools": [WEATHER]}, {"messages": CHAT}]
    name = write(tmp_path / "c.jsonl", "\n".join(json.dumps(line) for line in lines))
    assert text_of(folder, rows_of(folder, tmp_path, name, tokens=14, length=14).tokens[0, 1:]) == "tools! plain!"
    (folder / "chat_template.jinja").write_text("file ")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("beside ")
    assert text_of(folder, rows_of(folder, tmp_path, name, tokens=13, length=13).tokens[0, 1:]) == "beside file "


# --------------------------------------------------------------------------------------------------------- bad chats

USER = {"role": "user", "content": "hi"}
BAD_ROWS: list[tuple[dict[str, Any], str]] = [
    ({"messages": "hi"}, "messages is text, a list was needed"),
    ({"messages": [USER, 5]}, r"messages\[1\] is a number, an object with `role` and `content` was needed"),
    (
        {"messages": [{"from": "user", "value": "hi", "role": "user"}]},
        r"\[0\] has no `content`, only from, value, role",
    ),
    ({"messages": [USER, USER, USER | {"content": 7}]}, r"messages\[2\].content is a number, text or a list of parts"),
    ({"messages": [USER | {"content": [{"type": "image_url"}]}]}, r"content\[0\] is a part of type 'image_url', only"),
    ({"messages": [USER | {"content": [{"type": "text"}]}]}, r"content\[0\].text is missing or null, text was needed"),
    ({"messages": [USER | {"content": [True]}]}, r"content\[0\] is true or false"),
    ({"messages": [called("{city")]}, r"tool_calls\[0\].function.arguments is text, but no JSON .Expecting"),
    ({"messages": [called(5)]}, "arguments is a number, an object was needed"),
    ({"messages": [USER | {"tool_calls": [{"function": {}}]}]}, "function.name is missing or null"),
    ({"messages": [USER | {"tool_calls": [{"function": "f"}]}]}, "function is text, an object was needed"),
    ({"messages": [USER], "tools": "weather"}, "tools is text, but no JSON"),
    ({"messages": [USER], "tools": {"name": "f"}}, "tools is an object, a list of objects was needed"),
    ({"messages": [USER], "tools": ["f"]}, r"tools\[0\] is text, an object was needed"),
    ({"messages": [USER], "documents": [1]}, r"documents\[0\] is a number"),
    ({"messages": [USER], "chat_template_kwargs": [1]}, "chat_template_kwargs is a list, an object was needed"),
    ({"messages": [USER], "chat_template_kwargs": {"tools": 1}}, "has the key tools, which is a key of the row itself"),
    ({"messages": [{"role": "user", "\x1b[31m": 1}]}, r"only 'role, .x1b\[31m'"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_a_bad_chat_is_one_line_that_names_the_row_and_the_key(row: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message) as caught:
        chat_document("chats.jsonl:3", row)
    assert str(caught.value).startswith("chats.jsonl:3: ")
    assert str(caught.value).isprintable()


def test_chats_without_content_are_left_out_and_refused_beyond_a_tenth(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    full = {"messages": [USER]}
    silent = {"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": None}]}
    name = write(tmp_path / "c.jsonl", "\n".join(map(json.dumps, [full, silent, *[full] * 8])))
    (entry,) = rows_of(folder, tmp_path, name, tokens=8).provenance
    assert (entry.documents, entry.tokens) == (9, 9 * 3)
    name = write(tmp_path / "d.jsonl", "\n".join(map(json.dumps, [full, silent, silent, *[full] * 8])))
    with pytest.raises(
        CalibrationError, match=r"d.jsonl: 2 of 11 chats have no content at all, the first is d.jsonl:2"
    ):
        rows_of(folder, tmp_path, name, tokens=8)


def test_parquet_chats_with_tools_and_null_entries(tmp_path: Path) -> None:
    """In a column all objects have the keys of any; those that a message lacks are null and reach no template."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    messages = [USER, called({"city": "Bonn"}, content=None)]
    table = arrow.table({"messages": [messages], "tools": [[WEATHER]], "id": [1]})
    assert table["messages"][0].as_py()[0]["tool_calls"] is None
    parquet.write_table(table, tmp_path / "c.parquet")
    template = "{{ messages | tojson }}{{ tools | tojson }}"
    folder = write_checkpoint(tmp_path / "model", chat_template=template)
    without = [USER, {key: value for key, value in messages[1].items() if key != "content"}]
    assert by_transformers(template, {"messages": messages, "tools": [WEATHER]}) == json.dumps(
        without, ensure_ascii=False
    ) + json.dumps([WEATHER], ensure_ascii=False)
    n_bytes = rows_of(folder, tmp_path, "c.parquet", tokens=8).provenance[0].tokens
    rows = rows_of(folder, tmp_path, "c.parquet", tokens=n_bytes + 1, length=n_bytes + 1)
    found, end = json.JSONDecoder().raw_decode(text := text_of(folder, rows.tokens[0, 1:]))
    assert (found, json.loads(text[end:])) == (without, [WEATHER])


# ------------------------------------------------------------------------------------------------------ the sandbox


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "TemplateSyntaxError .line 1."),
        ("{{ messages[5].content }}", "UndefinedError"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ messages[0].update(a=1) }}", "SecurityError"),
        ("{{ namespace(__class__=1) }}", "SecurityError"),
        ("{% set n = namespace(a=1) %}{% set n._a = 1 %}", "SecurityError"),
        ("{% generation %}{{ ''.__class__ }}{{ 1 + '' }}{% endgeneration %}", "SecurityError|TypeError"),
        ("{% generation %}", "TemplateSyntaxError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{% for a in range(99999999) %}{% endfor %}", "OverflowError"),
        ("{{ 'x' * 5000000 }}", "rendered 5,000,000 characters"),
        ("{{ 'x' * 9999999999 }}", "more memory"),
    ],
)
def test_bad_template_fails_with_a_reason(template: str, message: str) -> None:
    with pytest.raises(TemplateFailure, match=message):
        render_chats({"default": template}, [ChatDocument("", CHAT)], {})


def test_endless_template_is_stopped() -> None:
    template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(TemplateFailure, match="no end after 1 s of CPU time"):
        render_chats({"default": template}, [ChatDocument("", CHAT)], {}, cpu_seconds=1)


def test_failure_names_the_chat(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", chat_template="{{ messages[0].name + messages[0].content }}")
    lines = [{"messages": [{"role": "user", "content": "hi"} | more]} for more in ({"name": "Ann"}, {})]
    name = write(tmp_path / "c.jsonl", "\n\n".join(json.dumps(line) for line in lines))
    with pytest.raises(CalibrationError, match="c.jsonl:3: the checkpoint's chat template failed: UndefinedError"):
        rows_of(folder, tmp_path, name)


def test_what_published_templates_use() -> None:
    template = (
        "{%- for m in messages -%}\n    {%- if loop.index > 1 %}{% break %}{% endif -%}\n{{ m | tojson }}{% endfor %}"
        "{{ strftime_now('%Y') }}{{ tools is none }}{{ add_generation_prompt }}"
    )
    assert render_chats({"default": template}, [ChatDocument("", [*CHAT, *CHAT])], {}) == [
        '{"role": "user", "content": "hi"}2025TrueFalse'
    ]
