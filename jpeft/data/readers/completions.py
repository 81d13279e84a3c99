"""Texts of one's own to learn to write: JSON-lines files of chats, or of prompts and completions.

    completions:PATH                          a file, which is divided: 80 % 'train', 20 % 'test'
    completions:FOLDER                        a file for each split: train.jsonl, test.jsonl
    completions:PATH?messages=conversation    another name than 'messages'
    completions:PATH?prompt=question&completion=answer
                                              other names than 'prompt' and 'completion'
    completions:PATH?tools=functions          another name than 'tools'

A file is divided by a hash of what is asked, so that equal questions are in one split.
A line is a chat, {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant",
"content": "Hello."}]}, or a pair, {"prompt": "2 + 2 =", "completion": " 4"}, whose texts are put
together as they are. The assistant's messages and the completions are what is learnt.

Messages may have further fields that a chat template writes, such as 'tool_calls' of the assistant,
whose content may then be null or missing. A chat may have 'tools', a list of JSON schemas or the
JSON text of one.
"""

import functools
import json
from pathlib import Path
from typing import Any

from jpeft import jsonfiles

from ..source import Dataset, Example, split_rows, suggestion
from .files import Values, examples_of, files_of, jsonl_rows, options_of

NAMES = {'messages': 'messages', 'prompt': 'prompt', 'completion': 'completion', 'tools': 'tools'}


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
    keys[split] = [asked(example) for example in found]
    examples += found
  return Dataset(examples.__getitem__, split_rows(keys), [])


def _example(file: Path, names: dict[str, str], line: int, values: Values) -> Example:
  """{'messages', ['tools']} or {'prompt', 'completion'} of a line."""
  return example_of(f'line {line} of {file}', file.name, names, values)


def example_of(where: str, name: str, names: dict[str, str], values: Values) -> Example:
  """{'messages', ['tools']} or {'prompt', 'completion'} of values.

  Args:
    where: what has them, for messages.
    name: of the source, for messages.
    names: {part of an example: its name among the values}.
    values: of a line or row.

  Raises:
    ValueError: they are neither a chat nor a pair.
  """
  if names['messages'] in values:
    messages = values[names['messages']]
    check_messages(where, messages)
    # Templates write the content of a call as a text, if at all.
    chat: Example = {
      'messages': [message | {'content': message.get('content') or ''} for message in messages]
    }
    tools = _tools(where, values.get(names['tools']))
    if tools:
      chat['tools'] = tools
    return chat
  pair = {}
  for part in ('prompt', 'completion'):
    column = names[part]
    if column not in values:
      raise ValueError(
        f'{where} has neither {names["messages"]!r} nor {column!r} (or name another one, '
        f'{name}?{part}=NAME); {suggestion(column, values)}'
      )
    text = values[column]
    if not isinstance(text, str):
      raise ValueError(f'{where} has {text!r} as its {column!r}; it must be a text')
    pair[part] = text
  return pair


def check_messages(where: str, messages: Any) -> None:
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
  content = message.get('content')
  if content is None and message.get('tool_calls'):
    content = ''
  return isinstance(message.get('role'), str) and isinstance(content, str)


def _tools(where: str, tools: Any) -> list[dict[str, Any]] | None:
  """The tools of a chat, of their list or its JSON text; None for none."""
  if isinstance(tools, str):
    tools = jsonfiles.parsed(tools or 'null', f'{where}: its tools are a text that')
  if tools is None:
    return None
  if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
    raise ValueError(f'{where}: tools are a list of JSON schemas, or the JSON text of one')
  return tools


def asked(example: Example) -> str:
  """What comes before the first answer; it decides the split, so that equal questions share one."""
  if 'prompt' in example:
    return example['prompt']
  messages = example['messages']
  roles = [message['role'] for message in messages]
  answer = roles.index('assistant', 1)  # one at the beginning answers nothing
  return json.dumps([[message['role'], message['content']] for message in messages[:answer]])
