import time
from datetime import datetime

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from accessory.errors import TokenizerError
from accessory.tokenizer.sandbox import ChatTemplate

MESSAGES = [{"role": "user", "content": "a 'b' é <"}, {"role": "assistant", "content": "c"}]


@pytest.mark.parametrize(
    "text",
    [
        "{% for m in messages %}\n  {% if loop.last %}\n{{ loop.index }}{{ loop.length }}\n {% endif %}\n{% endfor %}x",
        "{% for m in messages %}{{ m.role }}{{ m['content'] | upper | trim }}{{ loop.previtem }}{% endfor %}",
        "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ {'é': 1} | tojson }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n ~ '!' }}",
        "{% macro say(m) %}{{ m.role }}: {{ m.content }}{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}",
        "{{ bos_token }}{{ messages[0].content.split(' ')[-1] }}{{ missing }}{{ range(3) | list }}{{ 7 % 4 }}",
        "{% set x %}a{{ messages | length }}{% endset %}{{ x }}{{ messages | map(attribute='role') | join(', ') }}",
        "{{ messages[1:] | selectattr('role', 'equalto', 'assistant') | list | length }}{{ 'ab' * 3 }}{{ none }}",
        "{% if tools is not none %}t{% endif %}{% if tools %}u{% endif %}{{ messages[0].content is string }}",
        "{{ strftime_now('%Y') }}",
    ],
)
def test_it_renders_as_transformers_does(text):
    (theirs,), _ = render_jinja_template([MESSAGES], chat_template=text, bos_token="<s>")
    values = {"messages": MESSAGES, "bos_token": "<s>", "tools": None, "documents": None}
    assert ChatTemplate(text, "x").render(**values, add_generation_prompt=False) == theirs


@pytest.mark.parametrize(
    "text",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ 'x' * 10 ** 10 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x=['a']) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
        "{% set a = 'x' * 9999 %}{{ a.replace('x', a).replace('x', a) }}",
        "{% set a = 'x' * 9999 %}{{ a | replace('x', a) | replace('x', a) }}",
        "{% set a = 'x' * 99999 %}{{ ([a] * 99999) | join(a) }}",
        "{{ 'x'.ljust(10 ** 10) }}",
        "{{ 'x' | center(10 ** 10) }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '{:999999999}'.format(1) }}",
        "{{ 1 | tojson(indent=10 ** 6) }}",
    ],
)
def test_what_would_never_end_or_fill_the_memory_is_refused_in_time(text):
    began = time.process_time()
    with pytest.raises(TokenizerError, match="its chat template"):
        ChatTemplate(text, "somewhere").render(messages=MESSAGES)
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages.__init__.__globals__ }}",
        "{% include 'x' %}",
        "{% set x = self.__init__ %}{{ x() }}",
        "{{ missing.attribute }}",
        "{{ raise_exception('no') }}",
        "{{ messages[0].content + 1 }}",
        "{{ lipsum() }}",
    ],
)
def test_what_a_template_may_not_or_cannot_do_is_an_error_of_ours(text):
    template = ChatTemplate(text, "somewhere")
    with pytest.raises(TokenizerError, match="somewhere: its chat template cannot lay out the messages"):
        assert template.render(messages=MESSAGES) == ""


@pytest.mark.parametrize("text", ["{% if %}", "{{ x | nonsense }}", "{% for x in %}", "{% generation %}"])
def test_what_is_no_jinja_is_refused_at_once(text):
    with pytest.raises(TokenizerError, match="somewhere: its chat template is no valid Jinja"):
        ChatTemplate(text, "somewhere")


def test_a_template_beyond_all_measure_is_refused():
    with pytest.raises(TokenizerError, match="200,001 characters"):
        ChatTemplate("x" * 200_001, "somewhere")


def test_each_rendering_has_a_budget_of_its_own():
    template = ChatTemplate("{% for i in range(90000) %}{% endfor %}{{ 'x' * 3000000 }}", "somewhere")
    assert [len(template.render()) for _ in range(3)] == [3_000_000] * 3


def test_loops_that_call_themselves_are_refused():
    text = "{% for i in range(9999) recursive %}{% if loop.depth < 9 %}{{ loop(range(9999)) }}{% endif %}{% endfor %}"
    with pytest.raises(TokenizerError, match="recursive loops are not open to templates"):
        ChatTemplate(text, "somewhere")


def test_the_clock_can_be_set_and_lots_are_not_drawn():
    template = ChatTemplate("{{ strftime_now('%d.%m.%y %H:%M:%S') }}", "x", datetime(2024, 2, 29, 13, 5))
    assert [template.render() for _ in range(2)] == ["29.02.24 13:05:00"] * 2
    with pytest.raises(TokenizerError, match="'random'"):
        ChatTemplate("{{ ['a', 'b'] | random }}", "x")
