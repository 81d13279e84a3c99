"""JSON-lines files of chats, and of prompts with completions."""

import json

import pytest

from jpeft import data

CHAT = {
  'messages': [
    {'role': 'system', 'content': 's'},
    {'role': 'user', 'content': 'u'},
    {'role': 'assistant', 'content': 'a'},
  ]
}


def file(path, *rows):
  path.write_text(
    '\n'.join(row if isinstance(row, str) else json.dumps(row) for row in rows) + '\n'
  )
  return path


def test_one_file_is_divided_by_what_is_asked(tmp_path):
  pairs = [{'prompt': f'{i % 40}?', 'completion': f' {i}', 'more': 1} for i in range(80)]
  path = file(tmp_path / 'own.jsonl', *pairs, CHAT, '')
  train, test = (data.load(f'completions:{path}', split) for split in ('train', 'test'))
  assert train.classes == test.classes == [] and train.unit == 'word'
  found = [*train, *test]
  assert sorted(map(json.dumps, found)) == sorted(
    json.dumps(x) for x in [*({k: p[k] for k in ('prompt', 'completion')} for p in pairs), CHAT]
  )
  asked = [{e.get('prompt') for e in split} for split in (train, test)]
  assert not asked[0] & asked[1] and 2 <= len(asked[1]) <= 16
  assert [e.get('prompt') for e in train] != sorted(str(e.get('prompt')) for e in train)  # mixed
  assert train[0] == data.load(f'completions:{path}', 'train[:1]')[0]


def test_a_folder_has_a_file_a_split_and_columns_have_other_names(tmp_path):
  file(tmp_path / 'train.jsonl', {'q': '1', 'a': '2'}, {'talk': CHAT['messages']})
  file(tmp_path / 'dev.jsonl', {'q': '3', 'a': '4'})
  name = f'completions:{tmp_path}?prompt=q&completion=a&messages=talk'
  assert list(data.load(name, 'dev')) == [{'prompt': '3', 'completion': '4'}]
  assert len(data.load(name, 'train+dev')) == 3 and CHAT in list(data.load(name, 'train'))


MESSAGE = lambda role, content='x': {'role': role, 'content': content}


@pytest.mark.parametrize(
  'row,message',
  (
    (
      {'promt': 'a', 'completion': 'b'},
      "line 2 of .*own.jsonl has neither 'messages' nor 'prompt'.*mean 'promt'",
    ),
    ({'prompt': 'a'}, "has neither 'messages' nor 'completion'"),
    ({'prompt': 'a', 'completion': 3}, "has 3 as its 'completion'; it must be a text"),
    ({'messages': 'hi'}, "a chat is a list of messages, each with the texts 'role' and 'content'"),
    ({'messages': [{'role': 'user'}]}, 'a chat is a list of messages'),
    (
      {'messages': [MESSAGE('user'), MESSAGE('user')]},
      "no message of 'assistant' answers another.*roles: user, user",
    ),
    ({'messages': [MESSAGE('assistant')]}, 'there is nothing to learn'),
    ('{', 'is no JSON'),
  ),
  ids=('typo', 'half', 'number', 'text', 'message', 'unanswered', 'first', 'json'),
)
def test_what_is_no_chat_and_no_pair_is_named(row, message, tmp_path):
  path = file(tmp_path / 'own.jsonl', CHAT, row)
  with pytest.raises(ValueError, match=message):
    data.load(f'completions:{path}', 'train')


def test_unknown_options_and_files_are_named(tmp_path):
  path = file(tmp_path / 'own.jsonl', CHAT)
  with pytest.raises(ValueError, match="unknown option 'label'"):
    data.load(f'completions:{path}?label=x', 'train')
  with pytest.raises(
    FileNotFoundError, match="there is no file .*owm.jsonl; did you mean 'own.jsonl'"
  ):
    data.load(f'completions:{tmp_path}/owm.jsonl', 'train')


def test_chats_that_call_tools(tmp_path):
  call = {'type': 'function', 'function': {'name': 'f', 'arguments': {}}}
  asked = [{'role': 'user', 'content': 'u'}]
  schema = [{'type': 'function', 'function': {'name': 'f'}}]
  answers = [{'role': 'assistant', 'content': None}, {'role': 'assistant'}]
  rows = [{'messages': [*asked, answer | {'tool_calls': [call]}]} for answer in answers]
  rows[0]['functions'] = schema
  rows[1]['functions'] = json.dumps(schema)
  path = file(tmp_path / 'own.jsonl', *rows, CHAT)
  found = [*data.load(f'completions:{path}?tools=functions', 'train+test')]
  assert sum('tools' in example for example in found) == 2
  for example in found:
    if 'tools' in example:
      assert example['tools'] == schema
      assert example['messages'][1] == {'role': 'assistant', 'content': '', 'tool_calls': [call]}
  for tools in ('{', '3', {'name': 'f'}):
    path = file(tmp_path / 'own.jsonl', {**CHAT, 'tools': tools})
    with pytest.raises(ValueError, match='line 1 of .*own.jsonl.* tools are'):
      data.load(f'completions:{path}', 'train')
