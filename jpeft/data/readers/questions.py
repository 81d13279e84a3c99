"""Questions whose answers stand in a text: SQuAD's own JSON files, and JSON lines.

    squad:PATH                        a file of SQuAD 1.1 or 2.0 (arXiv:1606.05250, 1806.03822),
                                      which is divided: 80 % 'train', 20 % 'test'
    squad:FOLDER                      a file for each split, such as train-v1.1.json, dev-v1.1.json
    jsonl:PATH                        {"question": "Who?", "context": "Jane runs.",
                                      "answers": {"text": ["Jane"], "answer_start": [0]}} a line
    jsonl:PATH?question=q&context=text&answers=a
                                      other names than 'question', 'context' and 'answers'

The answers of a line may also be a list of {"text", "answer_start"}. None at all say that the text
has no answer, as in SQuAD 2.0. `answer_start` counts characters, from 0. A file is divided by a
hash of the context, so that all questions on a text are in one split.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jpeft import jsonfiles

from ..labels import ANSWERS
from ..source import Dataset, Example, split_rows, suggestion
from .files import Values, examples_of, files_of, json_object, jsonl_rows, options_of

NAMES = {'question': 'question', 'context': 'context', 'answers': 'answers'}


def squad(spec: str) -> Dataset:
  """The questions of a file of SQuAD, or of a folder of them.

  Raises:
    FileNotFoundError: no such file or folder.
    ValueError: not such a file, or an answer that does not stand where it is said to.
  """
  path, _ = options_of(spec, 'squad', (), {})
  return _dataset({split: _of_squad(file) for split, file in files_of(path, 'squad').items()})


def questions_jsonl(spec: str) -> Dataset:
  """The lines of a JSON-lines file, or of a folder of them; UTF-8, an object a line.

  Raises:
    FileNotFoundError: no such file or folder.
    ValueError: no lines, an unknown option, or a line without a question on a text.
  """
  path, names = options_of(spec, 'jsonl', tuple(NAMES), NAMES)
  parts = {}
  for split, file in files_of(path, 'jsonl').items():
    parts[split] = examples_of(file, jsonl_rows(file), functools.partial(_of_line, file, names))
  return _dataset(parts)


def question(line: str, where: str) -> Example:
  """{'question', 'context'} of a JSON object, to be answered.

  Raises:
    ValueError: it is no such object; `where` names it.
  """
  values = json_object(line, where)
  missing = [name for name in ('question', 'context') if name not in values]
  if missing:
    raise ValueError(f'{where} has no {missing[0]!r}; {suggestion(missing[0], values)}')
  return _example(where, values['question'], values['context'], [])


def _dataset(parts: dict[str, list[Example]]) -> Dataset:
  examples = [example for found in parts.values() for example in found]
  keys = {split: [example['context'] for example in found] for split, found in parts.items()}
  return Dataset(examples.__getitem__, split_rows(keys), [], labels=ANSWERS)


def _of_squad(file: Path) -> list[Example]:
  """The questions of a file, in its order."""
  try:
    articles = jsonfiles.read(file, object)['data']
  except (KeyError, TypeError) as error:
    raise ValueError(
      f"{file} is no file of SQuAD ({error}): it has an object with 'data', a list of articles"
    ) from error
  found: list[Example] = []
  try:
    for article in articles:
      for paragraph in article['paragraphs']:
        for asked in paragraph['qas']:
          where = f'question {asked.get("id", len(found))!r} of {file}'
          answers = [] if asked.get('is_impossible') else asked['answers']
          found.append(_example(where, asked['question'], paragraph['context'], answers))
  except (KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f'{file} is no file of SQuAD after {len(found)} questions ({error}): articles have '
      "'paragraphs', these 'context' and 'qas', and those 'question' and 'answers'"
    ) from error
  if not found:
    raise ValueError(f'{file} is empty: there is no question in it')
  return found


def _of_line(file: Path, names: dict[str, str], line: int, values: Values) -> Example:
  """The question of a line."""
  return question_of(f'line {line} of {file}', file.name, names, values)


def question_of(
  where: str, source: str, names: Mapping[str, str], values: Mapping[str, Any]
) -> Example:
  """{'question', 'context', 'answers': [(text, its first character)]} of values.

  Args:
    where: what has them, for messages.
    source: its name, for messages.
    names: {'question', 'context', 'answers': the name among the values}.
    values: of a line or row.

  Raises:
    ValueError: no question on a text, or an answer that does not stand where it is said to.
  """
  for part, name in names.items():
    if name not in values:
      raise ValueError(
        f'{where} has no {name!r} (or name another one, {source}?{part}=NAME); '
        f'{suggestion(name, values)}'
      )
  question, context, answers = (values[names[part]] for part in NAMES)
  return _example(where, question, context, _listed(where, names['answers'], answers))


def _listed(where: str, name: str, answers: Any) -> list[Any]:
  """Answers as a list of {'text', 'answer_start'}, of that or of two lists."""
  if answers is None:
    return []
  if isinstance(answers, list):
    return answers
  if isinstance(answers, dict):
    texts, starts = answers.get('text'), answers.get('answer_start')
    if isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts):
      return [
        {'text': text, 'answer_start': start} for text, start in zip(texts, starts, strict=True)
      ]
  raise ValueError(
    f'{where} has {answers!r:.60} as its {name!r}; it must be a list of {{"text", "answer_start"}},'
    ' or these two as lists of one length'
  )


def _example(where: str, question: Any, context: Any, answers: list[Any]) -> Example:
  """{'question', 'context', 'answers': [(text, its first character)]}."""
  if not isinstance(question, str) or not isinstance(context, str):
    raise ValueError(f'{where}: question and context must be texts')
  if not question.strip() or not context.strip():
    raise ValueError(f'{where} has an empty question, or an empty context')
  return {
    'question': question,
    'context': context,
    'answers': [_answer(where, context, answer) for answer in answers],
  }


def _answer(where: str, context: str, answer: Any) -> tuple[str, int]:
  text = start = None
  if isinstance(answer, dict):
    text, start = answer.get('text'), answer.get('answer_start')
  if not isinstance(text, str) or not text or not isinstance(start, int):
    raise ValueError(
      f'{where}: an answer is {{"text": a text, "answer_start": the number of its first character '
      f'in the context}}, not {answer!r:.60}'
    )
  there = context[start : start + len(text)] if start >= 0 else ''
  if there != text:
    raise ValueError(
      f'{where}: the answer {text!r:.60} does not stand at answer_start={start} of its context, '
      f'but {there!r:.60}'
    )
  return text, start
