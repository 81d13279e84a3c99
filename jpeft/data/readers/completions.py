"""Texts of one's own to learn to write: JSON-lines files of chats, or of prompts with their
completions.

    completions:PATH                    a file: split by a hash of what is asked: 80 % 'train', 20 % 'test'
    completions:FOLDER                  a file for each split: train.jsonl, test.jsonl
    completions:PATH?prompt=question&completion=answer    other names than 'prompt' and 'completion'
    completions:PATH?messages=conversation                another name than 'messages'

A line holds a chat, {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant",
"content": "Hello."}]}, or a pair, {"prompt": "2 + 2 =", "completion": " 4"}, whose texts are put
together as they are. The assistant's messages and the completions are what is learnt.
"""

import json
from pathlib import Path
from typing import Any

from ..source import Dataset, divided, nearest, shuffled
from .tables import examples_of, files_of, jsonl_rows, options_of

NAMES = {'messages': 'messages', 'prompt': 'prompt', 'completion': 'completion'}


def completions(spec: str) -> Dataset:
  """The lines of a JSON-lines file, or of a folder of them; UTF-8, an object a line.

  Raises:
    FileNotFoundError: no such file or folder.
    ValueError: no lines, an unknown option, or a line that is neither a chat nor a pair.
  """
  path, names = options_of(spec, 'completions', tuple(NAMES), NAMES)
  examples, splits = [], {}
  for split, file in files_of(path, 'jsonl').items():
    found = examples_of(
      file, jsonl_rows(file, names), lambda line, values: _example(file, line, values, names)
    )
    keys = [_asked(example) for example in found]
    rows = {split: shuffled(keys)} if split else divided(keys)
    splits |= {name: [len(examples) + i for i in order] for name, order in rows.items()}
    examples += found
  return Dataset(examples.__getitem__, splits, [])


def _example(
  file: Path, line: int, values: dict[str, Any], names: dict[str, str]
) -> dict[str, Any]:
  where = f'line {line} of {file}'
  if names['messages'] in values:
    return {'messages': _messages(where, values[names['messages']])}
  out = {}
  for name in ('prompt', 'completion'):
    if names[name] not in values:
      raise ValueError(
        f'{where} has neither {names["messages"]!r} nor {names[name]!r} (or name another one, '
        f'{file.name}?{name}=NAME); {nearest(names[name], values)}'
      )
    out[name] = values[names[name]]
    if not isinstance(out[name], str):
      raise ValueError(f'{where} has {out[name]!r} as its {names[name]!r}; it must be a text')
  return out


def _messages(where: str, messages) -> list[dict[str, str]]:
  if not isinstance(messages, list) or not all(
    isinstance(m, dict) and isinstance(m.get('role'), str) and isinstance(m.get('content'), str)
    for m in messages
  ):
    raise ValueError(
      f"{where}: a chat is a list of messages, each with the texts 'role' and 'content'"
    )
  if not any(m['role'] == 'assistant' for m in messages[1:]):
    roles = ', '.join(m['role'] for m in messages) or 'none'
    raise ValueError(
      f"{where}: no message of 'assistant' answers another, so there is nothing to learn; its roles: "
      f'{roles}'
    )
  return messages


def _asked(example: dict[str, Any]) -> str:
  """What comes before the first answer: what the split hangs on, so that equal questions stay
  together.
  """
  if 'prompt' in example:
    return example['prompt']
  answer = next(i for i, m in enumerate(example['messages']) if i and m['role'] == 'assistant')
  return json.dumps([[m['role'], m['content']] for m in example['messages'][:answer]])
