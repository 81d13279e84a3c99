"""From chats, prompts and completions to rows of tokens, several texts in one row."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

IGNORED = -1  # the label of a token that is not learnt
OPEN = 32  # rows that may still take a text

Part = tuple[str, bool]  # a piece of a text, and whether it is learnt


class Packed:
  """A source of rows of `length` tokens, each of as many whole texts as it has room for.

  The order of the examples, the tokenizer and the length say which texts share a row. A text that
  is too long is cut off, and left out where nothing of its completion stays.

  Attributes:
    classes: none: texts have no labels.
    about: how many texts, rows and tokens there are, and what was cut, in a line.
  """

  def __init__(self, source, tokenizer, length: int, chat: bool = False, pack: bool = True):
    """Reads, encodes and packs all examples.

    Args:
      source: len and [i] -> {'messages'} or {'prompt', 'completion'}, see `completions`.
      tokenizer: a `models.Tokenizer`.
      length: tokens of a row.
      chat: give prompts as messages of the user and completions as the answer.
      pack: False for one text a row.

    Raises:
      ValueError: a chat that the tokenizer cannot write, or no text with a completion.
    """
    self.classes, self._length, self._pad = [], length, tokenizer.pad
    self._rows: list[list[tuple[np.ndarray, np.ndarray]]] = []
    self._first: list[int] = []
    open_, cut, left_out, size = [], 0, 0, 0  # open_: (row, its room)
    for i in range(len(source)):
      tokens, learnt = encode(source[i], tokenizer, chat)
      cut += len(tokens) > length
      tokens, learnt = tokens[:length], learnt[:length]
      if not learnt[1:].any():
        left_out += 1
        continue
      size += len(tokens)
      place = (
        next((k for k, (_, room) in enumerate(open_) if room >= len(tokens)), None)
        if pack
        else None
      )
      row, room = ([], length) if place is None else open_.pop(place)
      if place is None:
        self._rows.append(row)
        self._first.append(i)
      row.append((tokens, learnt))
      open_ = [*open_, (row, room - len(tokens))][-OPEN:]
    if not self._rows:
      raise ValueError(
        f'of {len(source)} texts none has a completion within its first {length} tokens; raise '
        'data.max_length'
      )
    padding = 1 - size / (len(self._rows) * length)
    self.about = (
      f'{len(source) - left_out:,} texts in {len(self._rows):,} rows of {length} tokens, {padding:.0%} '
      'padding'
      + (f'; {cut:,} cut off' if cut else '')
      + (f', {left_out:,} left out: their completions begin later' if left_out else '')
    )

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, i: int) -> dict[str, Any]:
    """Row i.

    Returns:
      tokens: int32 [length]; token_mask: int32 [length], 1, 2, ... for the texts of the row and 0
        for padding; label:
      int32 [length], the token after each where that is learnt, else IGNORED; index: the number of
      its first example.
    """
    out = {
      'tokens': np.full(self._length, self._pad, np.int32),
      'token_mask': np.zeros(self._length, np.int32),
      'label': np.full(self._length, IGNORED, np.int32),
      'index': self._first[i],
    }
    start = 0
    for number, (tokens, learnt) in enumerate(self._rows[i], 1):
      end = start + len(tokens)
      out['tokens'][start:end], out['token_mask'][start:end] = tokens, number
      out['label'][start : end - 1] = np.where(learnt[1:], tokens[1:], IGNORED)
      start = end
    return out


def encode(example: dict[str, Any], tokenizer, chat: bool = False) -> tuple[np.ndarray, np.ndarray]:
  """(tokens int32 [N], learnt bool [N]) of an example; its last learnt token ends the text.

  Prompts are encoded by themselves, as they are when an answer is to be written.

  Raises:
    ValueError: see `parts`.
  """
  pieces, begin = parts(example, tokenizer, chat)
  found = _encoded(pieces, tokenizer, begin)
  tokens = [token for ids, _ in found for token in ids]
  learnt = [learn for ids, learn in found for _ in ids]
  if not tokens or tokens[-1] != tokenizer.eos:
    tokens, learnt = [*tokens, tokenizer.eos], [*learnt, True]
  return np.array(tokens, np.int32), np.array(learnt, bool)


def prompt(example: dict[str, Any], tokenizer, chat: bool = False) -> tuple[list[int], str]:
  """(tokens of the last prompt with all before it, the completion it should be given).

  Raises:
    ValueError: see `parts`.
  """
  pieces, begin = parts(example, tokenizer, chat)
  tokens = [token for ids, _ in _encoded(pieces[:-1], tokenizer, begin) for token in ids]
  return tokens, pieces[-1][0].removesuffix(tokenizer.token(tokenizer.eos))


def _encoded(pieces: Sequence[Part], tokenizer, begin: bool) -> list[tuple[list[int], bool]]:
  return [
    (tokenizer.encode(text, begin and not i), learn) for i, (text, learn) in enumerate(pieces)
  ]


def parts(example: dict[str, Any], tokenizer, chat: bool = False) -> tuple[list[Part], bool]:
  """(pieces of the text of an example, by turns given and learnt; whether a token that begins a
  text is missing).

  Raises:
    ValueError: the tokenizer has no chat template, or one that its tokens or these messages do not
      fit.
  """
  if 'messages' not in example and not chat:
    return [(example['prompt'], False), (example['completion'], True)], True
  messages = example.get('messages') or [
    {'role': 'user', 'content': example['prompt']},
    {'role': 'assistant', 'content': example['completion']},
  ]
  return _chat(messages, tokenizer), False


def _chat(messages: Sequence[dict[str, str]], tokenizer) -> list[Part]:
  """Each answer as the template closes it, up to the token that ends it."""
  found, written, eos = [], '', tokenizer.token(tokenizer.eos)
  for i, message in enumerate(messages):
    if message['role'] != 'assistant' or not i:
      continue
    asked, answered = tokenizer.chat(messages[:i]), tokenizer.chat(messages[: i + 1], reply=False)
    if not asked.startswith(written) or not answered.startswith(asked):
      raise ValueError(
        'the chat template writes the beginning of a chat differently when it goes on, so that what '
        'the model should answer is not known; give prompts and completions'
      )
    answer, end, _ = answered[len(asked) :].rpartition(eos)
    answer = answer + end if end else answered[len(asked) :]
    found += [(asked[len(written) :], False), (answer, True)]
    written = asked + answer
  _check(tokenizer, messages, written)
  return found


def _check(tokenizer, messages: Sequence[dict[str, str]], text: str) -> None:
  """Raises a ValueError if a marker such as <|user|>, which the template writes, is no token."""
  own, said = (
    set(re.findall(r'<\|[^|<>\s]+\|>', x)) for x in (text, ' '.join(m['content'] for m in messages))
  )
  for marker in sorted(own - said):
    if tokenizer.encoder.token_to_id(marker) is None:
      raise ValueError(
        f'the chat template writes {marker!r}, which is no token of this tokenizer: it needs the '
        'special tokens that its template was made for'
      )
