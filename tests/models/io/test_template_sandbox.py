"""Chat templates in their sandbox: the same text as without it, and an end to all of them."""

import time

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jpeft.models.io import template_costs, template_sandbox
from tests.fuzz.mutations import TEMPLATES

NAMES = {
  'messages': [
    {'role': 'system', 'content': 'Be brief.'},
    {'role': 'user', 'content': [{'type': 'text', 'text': ' Hi \n'}, {'type': 'image'}]},
    {'role': 'assistant', 'content': '<think>a</think>b', 'tool_calls': [{'name': 'f'}]},
  ],
  'tools': [{'name': 'f', 'parameters': {'x': {'type': 'integer'}, 'y': {}}}],
}
# What templates of published models are made of.
PIECES = (
  '{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{% endfor %}',
  "{% for m in messages if m.role != 'system' %}{{ loop.index0 }}{% else %}no{% endfor %}",
  '{% set ns = namespace(n=0, seen=[]) %}{% for m in messages[::-1] %}{% set ns.n = ns.n + 1 %}'
  "{% set ns.seen = ns.seen + [m.role] %}{% endfor %}{{ ns.n }}{{ ns.seen | join(', ') }}",
  "{{ messages[2].content.split('</think>')[-1].lstrip('\\n') }}",
  "{{ messages[2].content.split('</think>')[0].rstrip().split('<think>')[-1] | trim }}",
  "{% macro part(p, depth=0) %}{% if p is mapping %}{% for k, v in p.items() %}{{ ' ' * depth }}"
  '{{ k }}:{{ part(v, depth + 1) }}{% endfor %}{% else %}{{ p }}{% endif %}{% endmacro %}'
  '{{ part(tools[0]) }}',
  "{{ tools | map(attribute='name') | list }}",
  "{{ tools | selectattr('name', 'equalto', 'f') | list }}{{ messages[0]['role'] }}",
  "{{ '%s and %d' % ('a', 3) }}{{ '{} {x}'.format(1, x=2) }}{{ '%03d' | format(7) }}",
  "{{ 'a' ~ 1 ~ none ~ [1, 'b'] ~ {'k': (1, 2)} }}{{ 3 ** 2 // 2 % 3 }}{{ [0] * 3 }}{{ 'ab' * 2 }}",
  "{{ messages[1].content | selectattr('type', 'in', ['text']) | map(attribute='text') | join }}",
  '{{ tools[0].parameters | dictsort }}{{ tools[0] | length }}{{ range(5) | sum }}',
  "{% if 'x' in tools[0].parameters and messages | length > 2 %}yes{% endif %}{{ none is none }}",
  '{% for m in messages recursive %}{{ m.role }}{{ loop(m.tool_calls or ()) }}{% endfor %}',
  '{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}',
  '{% set text %}a{% for i in range(3) %}{{ i }}{% endfor %}{% endset %}{{ text | upper }}',
  "{% filter replace('a', 'b') %}aaa{{ 'a' }}{% endfilter %}",
  "{% macro f() %}<{{ caller('x') }}>{% endmacro %}{% call(x) f() %}{{ x }}!{% endcall %}",
  "{{ dict(a=1, **{'b': 2}) }}{{ 'x' if missing is defined else 'y' }}{{ missing }}{{ '%' * 3 }}",
  "{{ 'a\\nb' | indent(4) }}{{ 'x' | center(9) }}{{ [3, 1] | sort | first }}{{ 1.26 | round(1) }}",
  "{{ messages | tojson | length > 99 }}{{ 'abc'[::-1] }}{{ ('a', 'b') | reverse | list }}",
)


@pytest.mark.parametrize('piece', PIECES)
def test_a_template_writes_what_it_would_without_a_count(piece):
  plain = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols']
  )
  found = template_sandbox.render(template_sandbox.compiled(piece, ('<', '>')), NAMES)
  assert found == plain.from_string(piece).render(NAMES) != ''


@pytest.mark.parametrize('number', range(len(TEMPLATES)))
def test_no_template_runs_or_writes_for_ever(number, monkeypatch):
  monkeypatch.setattr(template_costs, 'WORK', 10**6)  # a tenth, for speed
  monkeypatch.setattr(template_costs, 'TEXT', 2**23)
  start = time.process_time()
  try:
    found = template_sandbox.render(template_sandbox.compiled(TEMPLATES[number], ('<', '>')), NAMES)
    assert len(found) < 10**7
  except Exception as error:
    assert not isinstance(error, MemoryError)
  assert time.process_time() - start < 10


def test_long_conversations_are_no_hostile_ones():
  template = (
    "{% for m in messages %}{% if loop.index0 == messages | length - 1 %}{{ 'last' }}{% endif %}"
    "{{ '<|' ~ m.role ~ '|>' }}{% if m.content.startswith('<tool>') %}tool{% endif %}"
    "{{ m.content.replace('<x>', '') | trim }}{% endfor %}"
  )
  messages = [{'role': 'user', 'content': 'word ' * 2000}] * 2000  # 20 million characters
  compiled = template_sandbox.compiled(template, ('<', '>'))
  assert len(template_sandbox.render(compiled, {'messages': messages})) > 19_000_000
