"""Texts of one's own to learn to write: JSON-lines files of chats, or of prompts and completions.

    completions:PATH                          a file, which is divided: 80 % 'train', 20 % 'test'
    completions:FOLDER                        a file for each split: train.jsonl, test.jsonl
    completions:PATH?messages=conversation    another name than 'messages'
    completions:PATH?prompt=question&completion=answer
                                              other names than 'prompt' and 'completion'

A file is divided by a hash of what is asked, so that equal questions are in one split.
A line is a chat, {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant",
"content": "Hello."}]}, or a pair, {"prompt": "2 + 2 =", "completion": " 4"}, whose texts are put
together as they are. The assistant's messages and the completions are what is learnt.
"""

import functools
import json
from pathlib import Path
from typing import Any

from ..source import Dataset, Example, split_rows, suggestion
from .files import Values, examples_of, files_of, jsonl_rows, options_of

NAMES = {'messages': 'messages', 'prompt': 'prompt', 'completion': 'completion'}


def completions(spec: str) -> Dataset:
  """The lines of a JSON-lines file, or of a folder of them; UTF-8, an object a line.

  Raises:
    FileNotFoundError: no such file or folder.
    ValueError: no lines, an unknown option, or a line that is neither a chat nor a pair.
  """
  path, names = options_of(spec, 'completions', tuple(NAMES), NAMES)
  examples = []
  keys = {}
  for split, file in files_of(path, 'jsonl').items():
    found = examples_of(file, jsonl_rows(file), functools.partial(_example, file, names))
    keys[split] = [_asked(example) for example in found]
    examples += found
  return Dataset(examples.__getitem__, split_rows(keys), [])


def _example(file: Path, names: dict[str, str], line: int, values: Values) -> Example:
  """{'messages'} or {'prompt', 'completion'} of a line."""
  where = f'line {line} of {file}'
  if names['messages'] in values:
    messages = values[names['messages']]
    _check_messages(where, messages)
    return {'messages': messages}
  pair = {}
  for part in ('prompt', 'completion'):
    name = names[part]
    if name not in values:
      raise ValueError(
        f'{where} has neither {names["messages"]!r} nor {name!r} (or name another one, '
        f'{file.name}?{part}=NAME); {suggestion(name, values)}'
      )
    text = values[name]
    if not isinstance(text, str):
      raise ValueError(f'{where} has {text!r} as its {name!r}; it must be a text')
    pair[part] = text
  return pair


def _check_messages(where: str, messages: Any) -> None:
  """Raises a ValueError if it is no list of messages, or without an answer to learn."""
  if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
    raise ValueError(
      f"{where}: a chat is a list of messages, each with the texts 'role' and 'content'"
    )
  roles = [message['role'] for message in messages]
  if 'assistant' not in roles[1:]:
    listed = ', '.join(roles) or 'none'
    raise ValueError(
      f"{where}: no message of 'assistant' answers another, so there is nothing to learn; its "
      f'roles: {listed}'
    )


def _is_message(message: Any) -> bool:
  if not isinstance(message, dict):
    return False
  return isinstance(message.get('role'), str) and isinstance(message.get('content'), str)


def _asked(example: Example) -> str:
  """What comes before the first answer; it decides the split, so that equal questions share one."""
  if 'prompt' in example:
    return example['prompt']
  messages = example['messages']
  roles = [message['role'] for message in messages]
  answer = roles.index('assistant', 1)  # one at the beginning answers nothing
  return json.dumps([[message['role'], message['content']] for message in messages[:answer]])
