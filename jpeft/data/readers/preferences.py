"""Preferences of one's own: JSON-lines files of prompts with a chosen and a rejected answer.

    preferences:PATH                          a file, which is divided: 80 % 'train', 20 % 'test'
    preferences:FOLDER                        a file for each split: train.jsonl, test.jsonl
    preferences:PATH?prompt=question&chosen=better&rejected=worse
                                              other names than 'prompt', 'chosen' and 'rejected'
    preferences:PATH?malformed=skip           lines that are no such pair are left out, and counted

A line has one of these layouts:

    {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
    {"chosen": "\\n\\nHuman: Hi\\n\\nAssistant: Hello", "rejected": "\\n\\nHuman: Hi\\n\\nAss..."}
    {"chosen": [{"role": "user", ...}, {"role": "assistant", ...}], "rejected": [...]}
    {"prompt": [{"role": "user", ...}], "chosen": [{"role": "assistant", ...}], "rejected": [...]}

Texts without a prompt are those of Anthropic's HH, in which the last '\\n\\nAssistant:' of the
chosen text ends the prompt; lists of messages are those of UltraFeedback and of trl. Beside a list,
a prompt that is a text is a message of the user. Both answers follow the same messages, and only
the last message of each is learned. A file is divided by a hash of the prompt.
"""

import json
from pathlib import Path
from typing import Any

from ..labels import PREFERENCES
from ..source import Dataset, Example, split_rows, suggestion
from .completions import check_messages
from .files import MALFORMED, Values, files_of, jsonl_rows, options_of, skips

NAMES = {'prompt': 'prompt', 'chosen': 'chosen', 'rejected': 'rejected'}
ANSWERS = ('chosen', 'rejected')
_ANSWER = '\n\nAssistant:'  # what an answer begins with in the texts of HH


def preferences(spec: str) -> Dataset:
  """The lines of a JSON-lines file, or of a folder of them; UTF-8, an object a line.

  Raises:
    FileNotFoundError: no such file or folder.
    ValueError: no lines, an unknown option, or a line that is no pair of answers to a prompt.
  """
  default = {**NAMES, 'malformed': MALFORMED[0]}
  path, names = options_of(spec, 'preferences', tuple(default), default)
  skip = skips(spec, 'preferences', names.pop('malformed'))
  examples: list[Example] = []
  keys = {}
  notes = []
  for split, file in files_of(path, 'jsonl').items():
    found, skipped = _examples(file, names, skip)
    keys[split] = [asked_of(example) for example in found]
    examples += found
    if skipped:
      notes.append(
        f'{file}: {len(skipped):,} malformed lines are left out, the first: {skipped[0]}'
      )
  return Dataset(examples.__getitem__, split_rows(keys), [], labels=PREFERENCES, notes=tuple(notes))


def _examples(file: Path, names: dict[str, str], skip: bool) -> tuple[list[Example], list[str]]:
  """(the examples of a file, what is wrong with lines that are skipped)."""
  found = []
  skipped = []
  for line, values in jsonl_rows(file):
    try:
      found.append(preference_of(f'line {line} of {file}', file.name, names, values))
    except ValueError as error:
      if not skip:
        raise
      skipped.append(str(error))
  if not found:
    raise ValueError('; '.join([f'{file} has no pair of answers in it', *skipped[:1]]))
  return found, skipped


def preference_of(where: str, name: str, names: dict[str, str], values: Values) -> Example:
  """{'chosen', 'rejected'} of values, each {'prompt', 'completion'} or {'messages'}.

  Args:
    where: what has them, for messages.
    name: of the source, for messages.
    names: {part of an example: its name among the values}.
    values: of a line or row.

  Raises:
    ValueError: they are no two answers to one prompt.
  """
  for part in ANSWERS:
    if names[part] not in values:
      raise ValueError(
        f'{where} has no {names[part]!r} (or name another one, {name}?{part}=NAME); '
        f'{suggestion(names[part], values)}'
      )
  prompt = values.get(names['prompt'])
  answers = [values[names[part]] for part in ANSWERS]
  if all(isinstance(answer, str) for answer in answers) and isinstance(prompt, (str, type(None))):
    if prompt is None:
      prompt, answers = _divided(where, answers)
    pairs = [{'prompt': prompt, 'completion': answer} for answer in answers]
  elif all(isinstance(answer, list) for answer in answers):
    pairs = [{'messages': _chat(where, prompt, answer)} for answer in answers]
    if pairs[0]['messages'][:-1] != pairs[1]['messages'][:-1]:
      raise ValueError(f'{where}: the chosen and the rejected answer follow different messages')
  else:
    kinds = ', '.join(type(value).__name__ for value in (prompt, *answers))
    raise ValueError(
      f'{where}: the answers are two texts, or two lists of messages, and the prompt a text or, '
      f'before messages, a list of them; not {kinds}'
    )
  return dict(zip(ANSWERS, pairs, strict=True))


def _divided(where: str, texts: list[str]) -> tuple[str, list[str]]:
  """(what both texts begin with up to the last answer, the two answers)."""
  prompt, mark, _ = texts[0].rpartition(_ANSWER)
  prompt += mark
  if not mark or not texts[1].startswith(prompt):
    raise ValueError(
      f"{where} has no prompt, and its answers do not begin alike up to the last 'Assistant:' of "
      'the chosen one'
    )
  return prompt, [text.removeprefix(prompt) for text in texts]


def _chat(where: str, prompt: Any, answer: list) -> list[dict[str, Any]]:
  """The messages of a chat that ends with an answer."""
  messages = answer
  if isinstance(prompt, list):
    messages = answer if answer[: len(prompt)] == prompt else prompt + answer
  elif isinstance(prompt, str):
    asked = [m.get('content') for m in answer if isinstance(m, dict) and m.get('role') == 'user']
    if not asked:
      messages = [{'role': 'user', 'content': prompt}, *answer]
    elif prompt not in asked:
      raise ValueError(f'{where}: the prompt is none of the messages of the user')
  check_messages(where, messages)
  if messages[-1]['role'] != 'assistant':
    raise ValueError(
      f"{where}: the last message of an answer is of {messages[-1]['role']!r}, not 'assistant'"
    )
  return [message | {'content': message.get('content') or ''} for message in messages]


def asked_of(example: Example) -> str:
  """What the answers follow; it decides the split, so that equal prompts share one."""
  chosen = example['chosen']
  if 'prompt' in chosen:
    return chosen['prompt']
  return json.dumps([[m['role'], m['content']] for m in chosen['messages'][:-1]])
