"""Chat templates: what transformers gives them, by its documentation of chat templates."""

import datetime
import json
import types

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as parts

from jpeft import models

WORDS = ['<e>', '<s>', '<u>', 'a']
CHAT = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': '<b> "\u00e9"'}]


@pytest.fixture
def written(tmp_path):
  """written(template, messages, **options) -> what a tokenizer folder with it writes."""
  encoder = Tokenizer(parts.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token='<u>'))
  encoder.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  encoder.save(str(tmp_path / 'tokenizer.json'))

  def write(template, messages=CHAT, **options):
    specials = {'eos_token': {'content': '<e>'}, 'unk_token': '<u>', 'bos_token': None}
    config = {**specials, 'chat_template': template}
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
    tokenizer = models.load_tokenizer(tmp_path)
    found = tokenizer.chat(messages, **options)
    models.save_tokenizer(tokenizer, tmp_path)
    assert models.load_tokenizer(tmp_path).chat(messages, **options) == found
    return found

  return write


def test_what_a_template_is_given(written):
  names = '{{ eos_token }}{{ unk_token }}{{ bos_token }}|{{ add_generation_prompt }}|{{ tools }}'
  assert written(names + '|{{ documents is none }}') == '<e><u>|True|None|True'
  assert written('{{ tools[0].name }}', tools=[{'name': 'f'}]) == 'f'
  assert written('{{ messages[1].content | tojson }}') == '"<b> \\"\u00e9\\""'
  assert written('{{ messages[0] | tojson(indent=1) }}').count('\n') == 3
  loop = '{% for m in messages %}{% if loop.index0 %}{% break %}{% endif %}{{ m.role }}{% endfor %}'
  assert written(loop) == 'user'


def test_generation_blocks_are_their_content(written):
  block = '{% for m in messages %}{% generation %}{{ m.role }},{% endgeneration %}{% endfor %}'
  assert written(block) == 'user,assistant,'


def test_the_date_is_that_of_today_unless_it_is_fixed(written, monkeypatch):
  monkeypatch.delenv('SOURCE_DATE_EPOCH', raising=False)
  today = {datetime.date.today().isoformat()}
  found = written("{{ strftime_now('%Y-%m-%d') }}")
  assert found in today | {datetime.date.today().isoformat()}  # at midnight
  monkeypatch.setenv('SOURCE_DATE_EPOCH', '86400')
  assert written("{{ strftime_now('%d %b %Y') }}") == '02 Jan 1970'


def test_templates_with_names(written, tmp_path):
  named = [{'name': 'default', 'template': 'plain'}, {'name': 'tool_use', 'template': 'tools'}]
  assert written(named) == 'plain'
  assert written(named, tools=[{'name': 'f'}]) == 'tools'
  assert written(named[:1], tools=[{'name': 'f'}]) == 'plain'
  with pytest.raises(ValueError, match="none is called 'default': there are tool_use"):
    written(named[1:])
  (tmp_path / 'chat_template.jinja').write_text('file')
  assert written('config') == 'file'


@pytest.mark.parametrize(
  'template',
  ["{{ raise_exception('x') }}", '{{ messages[0].content + none }}', '{% if %}', '{{ a.b.c }}'],
)
def test_templates_that_refuse(written, template):
  with pytest.raises(ValueError, match='the chat template refuses the messages: '):
    written(template)


def test_named_templates_of_gguf():
  from jpeft.models.io.tokenizer import _template_of_gguf

  key = 'tokenizer.chat_template'
  read = lambda **metadata: _template_of_gguf(types.SimpleNamespace(metadata=metadata))
  assert read(**{key: 'a', f'{key}s': ['tool_use']}) == 'a'
  assert read(**{key: 'a', f'{key}.tool_use': 'b'}) == {'default': 'a', 'tool_use': 'b'}
  assert read(**{f'{key}.tool_use': 'b'}) == {'tool_use': 'b'} and read() is None
