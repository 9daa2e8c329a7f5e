"""Words of YAML and of chat templates that mean something, to be put where they do not belong."""

from __future__ import annotations

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<user>' if message['role'] == 'user' else '<assistant>' }}"
    "{{ message['content'] }}{% endfor %}"
)
RECIPE_WORDS = (
    *("!!int ", "!!float ", "!!bool ", "!!str ", "!!null ", "!!timestamp ", "!!binary ", "!!set ", "!!seq ", "!x "),
    *("&a ", "*a", "<<: ", "? ", "- ", ": ", "[", "]", "{", "}", "|", ">", "'", '"', "#", "%", "@", "`", "\t", "\0"),
    *("\u2028", "0x", "0o", "1_0", "1:2:3", ".inf", ".nan", "~", "2020-01-01", "9" * 40, "1e999", "\\", "---", "..."),
    *("\ufeff", "é", "\x85", "\ud800", "0x" + "F" * 5000, "1:" * 5000, "[" * 500, "- " * 500, "\n", " ", "GiB"),
)
TEMPLATE_WORDS = (
    *("{{", "}}", "{%", "%}", "{#", "#}", "for m in messages", "endfor", "if", "endif", "else", "m.content"),
    *("m['role']", "bos_token", "raise_exception('x')", "strftime_now('%Y')", "''.__class__", ".__mro__", "[1]"),
    *("|tojson", "|length", "|list", "|join", "|format", "|attr('__class__')", "|map(attribute='__class__')"),
    *("range(10)", "range(10**9)", "namespace(x=1)", "set ns.x = 2", "set x = x * x", "loop.index", "cycler"),
    *("joiner()", "lipsum()", "dict(a=1)", "self", "caller()", "macro f(x)", "endmacro", "f(1)", "call f()"),
    *("endcall", "filter upper", "endfilter", "include 'x'", "import 'x' as y", "extends 'x'", "block a", "endblock"),
    *(
        "%",
        "*",
        "**",
        "//",
        "/0",
        "~",
        "-",
        "break",
        "continue",
        "do",
        "'a' * 10**9",
        "[1]*10**9",
        "'%1000000000d' % 1",
    ),
    *(".format(1)", "\0", "\ud800", "é", "9" * 5000, "(" * 200, "not " * 500, "1 if 1 else " * 300, "generation"),
)
