"""From chats, prompts and completions to rows of tokens, several texts in one row."""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .source import Example

IGNORED = -1  # the label of a token that is not learnt
OPEN = 32  # rows that may still take a text

# A token is learnt if its prediction counts in the loss.
Message = dict[str, Any]  # 'role' and 'content', of calls 'tool_calls' and more
Piece = tuple[str, bool]  # a part of a text, whether it is learnt
Text = tuple[np.ndarray, np.ndarray]  # tokens int32 [N], whether each is learnt bool [N]


class Written(NamedTuple):
  """The text of an example.

  Attributes:
    pieces: in order.
    begins: whether the token that begins a text must be put before them. A chat template writes
      such a token itself.
    ends: whether the token that ends a text must be learnt after them, if it is not their last. A
      chat template with {% generation %} blocks says itself what is learnt.
  """

  pieces: list[Piece]
  begins: bool
  ends: bool = True


@dataclasses.dataclass(eq=False)
class _Row:
  """Texts that share a row.

  Attributes:
    first: number of the example that is its first text.
    room: tokens that are free.
    texts: the texts, one after the other.
  """

  first: int
  room: int
  texts: list[Text] = dataclasses.field(default_factory=list)

  def add(self, tokens: np.ndarray, learnt: np.ndarray) -> None:
    self.texts.append((tokens, learnt))
    self.room -= len(tokens)


class Packed:
  """A source of rows of `length` tokens, each of as many whole texts as it has room for.

  Which texts share a row depends on the order of the examples, the tokenizer and the length alone.
  A text that is too long is cut off, and left out if nothing of its completion stays.

  Attributes:
    classes: empty: texts have no labels.
    about: a line with the numbers of texts, rows and tokens, and of what was cut off or left out.
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
      ValueError: a chat that the tokenizer cannot write, a token that the model has no row for, or
        no text with a completion.
    """
    self.classes = []
    self._length = length
    self._pad = tokenizer.pad
    self._rows: list[_Row] = []
    open_rows: list[_Row] = []  # the row that took a text last is the last
    cut = 0
    left_out = 0
    empty = 0
    endless = 0
    for number in range(len(source)):
      try:
        tokens, learnt = encode(source[number], tokenizer, chat)
      except ValueError as error:
        raise ValueError(f'example {number}: {error}') from error
      if len(tokens) > length:
        cut += 1
      tokens = tokens[:length]
      learnt = learnt[:length]
      # The first token is never a label, as no token is before it.
      if not learnt[1:].any():
        left_out += 1
        continue
      if (tokens[learnt] == tokenizer.eos).all():
        empty += 1
      if len(tokens) < length and tokenizer.eos not in tokens[learnt]:
        endless += 1
      row = None
      if pack:
        row = next((row for row in open_rows if row.room >= len(tokens)), None)
      if row is None:
        row = _Row(first=number, room=length)
        self._rows.append(row)
      else:
        open_rows.remove(row)
      row.add(tokens, learnt)
      # Bounded, so that packing takes time in proportion to the number of texts.
      open_rows = [*open_rows, row][-OPEN:]
    if not self._rows:
      raise ValueError(
        f'of {len(source)} texts none has a completion within its first {length} tokens; raise '
        'data.max_length'
      )
    if empty == len(source) - left_out:
      raise ValueError(
        f'of {len(source)} texts all completions are empty, so that there is nothing to learn but '
        'to end'
      )
    padding = sum(row.room for row in self._rows) / (len(self._rows) * length)
    self.about = (
      f'{len(source) - left_out:,} texts in {len(self._rows):,} rows of {length} tokens, '
      f'{padding:.0%} padding'
    )
    if cut:
      self.about += f'; {cut:,} cut off'
    if left_out:
      self.about += f', {left_out:,} left out: their completions begin later'
    if empty:
      self.about += f'; {empty:,} with an empty completion'
    if endless:
      self.about += (
        f'; {endless:,} of which no end is learnt, as it lies outside of the generation blocks of '
        'the chat template'
      )
    self.about = '; '.join([self.about, *getattr(source, 'notes', ())])

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, i: int) -> Example:
    """Row i.

    Returns:
      'tokens': int32 [length].
      'token_mask': int32 [length], 1, 2, ... for the texts of the row and 0 for padding.
      'label': int32 [length], the token after each where that is learnt, else IGNORED.
      'index': the number of its first example.
    """
    row = self._rows[i]
    tokens = np.full(self._length, self._pad, np.int32)
    token_mask = np.zeros(self._length, np.int32)
    label = np.full(self._length, IGNORED, np.int32)
    start = 0
    for number, (text, learnt) in enumerate(row.texts, 1):
      end = start + len(text)
      tokens[start:end] = text
      token_mask[start:end] = number
      # The last token of a text has no next one, though another text may follow in the row.
      label[start : end - 1] = np.where(learnt[1:], text[1:], IGNORED)
      start = end
    return {'tokens': tokens, 'token_mask': token_mask, 'label': label, 'index': row.first}


def encode(example: Example, tokenizer, chat: bool = False, last: bool = False) -> Text:
  """(tokens int32 [N], learnt bool [N]) of an example; its last learnt token ends the text.

  Prompts are encoded by themselves, as they are when an answer is to be written.

  Args:
    example: see `completions`.
    tokenizer, chat: see `Packed`.
    last: learn the last answer of a chat alone.

  Raises:
    ValueError: see `pieces_of`.
  """
  written = pieces_of(example, tokenizer, chat)
  tokens = []
  learnt = []
  pieces = written.pieces
  if last:
    pieces = [*((text, False) for text, _ in pieces[:-1]), pieces[-1]]
  for ids, learn in _encoded(pieces, tokenizer, written.begins):
    tokens += ids
    learnt += [learn] * len(ids)
  if written.ends and (not tokens or tokens[-1] != tokenizer.eos):
    tokens.append(tokenizer.eos)
    learnt.append(True)
  return np.array(tokens, np.int32), np.array(learnt, bool)


def prompt(example: Example, tokenizer, chat: bool = False) -> tuple[list[int], str]:
  """(tokens of the last prompt with all before it, the completion it should be given).

  Raises:
    ValueError: see `pieces_of`.
  """
  written = pieces_of(example, tokenizer, chat)
  *given, (completion, _) = written.pieces
  tokens = []
  for ids, _ in _encoded(given, tokenizer, written.begins):
    tokens += ids
  return tokens, completion.removesuffix(tokenizer.token(tokenizer.eos))


def _encoded(pieces: Sequence[Piece], tokenizer, begins: bool) -> list[tuple[list[int], bool]]:
  """(tokens, whether they are learnt) of each piece.

  Args:
    pieces: the text, cut where learning begins or ends.
    begins: put the token that begins a text before the first piece.
  """
  found = []
  for i, (text, learn) in enumerate(pieces):
    first = i == 0
    ids = tokenizer.encode(text, begins and first)
    found.append((ids, learn))
  return found


def pieces_of(example: Example, tokenizer, chat: bool = False) -> Written:
  """The text of an example, in pieces that are by turns given and learnt.

  Raises:
    ValueError: the tokenizer has no chat template, or one that its tokens or these messages do not
      fit.
  """
  if 'messages' not in example and not chat:
    return Written([(example['prompt'], False), (example['completion'], True)], begins=True)
  messages = example.get('messages') or [
    {'role': 'user', 'content': example['prompt']},
    {'role': 'assistant', 'content': example['completion']},
  ]
  tools = example.get('tools')
  generated = tokenizer.generations(messages, tools)
  if generated is None:
    return Written(_chat(messages, tokenizer, tools), begins=False)
  return Written(_generated(generated, messages, tokenizer, tools), begins=False, ends=False)


def _generated(
  pieces: list[Piece],
  messages: Sequence[Message],
  tokenizer,
  tools: Sequence[dict[str, Any]] | None,
) -> list[Piece]:
  """The pieces of a chat whose template says what is learnt, up to the last one that is."""
  text = ''.join(piece for piece, _ in pieces)
  _check_markers(tokenizer, [*messages, *(tools or ())], text)
  _check_written(tokenizer, messages, tools, text)
  while pieces and not pieces[-1][1]:
    pieces = pieces[:-1]
  if not pieces:
    raise ValueError(
      'the {% generation %} blocks of the chat template are empty for these messages'
    )
  return pieces


def _chat(
  messages: Sequence[Message], tokenizer, tools: Sequence[dict[str, Any]] | None
) -> list[Piece]:
  """The pieces of a chat: each answer as the template closes it, up to the token that ends it."""
  eos = tokenizer.token(tokenizer.eos)
  pieces = []
  written = ''  # the text of all pieces
  for turn, message in enumerate(messages):
    if turn == 0 or message['role'] != 'assistant':
      continue
    asked = tokenizer.chat(messages[:turn], tools=tools)
    answered = tokenizer.chat(messages[: turn + 1], reply=False, tools=tools)
    if not asked.startswith(written) or not answered.startswith(asked):
      raise ValueError(
        'the chat template writes the beginning of a chat differently when it goes on, so that '
        'what the model should answer is not known; give prompts and completions'
      )
    answer = answered.removeprefix(asked)
    # What the template writes after the end, such as a line break, is given with the next turn.
    content, end, _ = answer.rpartition(eos)
    if end:
      answer = content + end
    pieces += [(asked.removeprefix(written), False), (answer, True)]
    written = asked + answer
    last = turn
  _check_markers(tokenizer, [*messages, *(tools or ())], written)
  _check_written(tokenizer, messages[: last + 1], tools, written)
  return pieces


def _check_written(
  tokenizer, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None, text: str
) -> None:
  """Raises a ValueError if the template leaves out a message, its tool calls, or the tools.

  Templates do so without a word with roles and fields that they do not know.

  Args:
    tokenizer: with the template.
    messages: a chat up to its last answer.
    tools: of the chat.
    text: the chat as the template writes it.
  """

  def changes(others: Sequence[Message], other_tools: Sequence | None) -> bool:
    """Whether the template writes another chat otherwise, or refuses it."""
    try:
      written = tokenizer.chat(others, reply=False, tools=other_tools)
    except ValueError:
      return True
    return written != tokenizer.chat(messages, reply=False, tools=tools)

  left_out = None
  if tools and not changes(messages, None):
    left_out = "the chat's tools"
  for i, message in enumerate(messages):
    other = None
    what = ''
    if message.get('tool_calls'):
      what = ' tool_calls'
      other = {name: value for name, value in message.items() if name != 'tool_calls'}
    elif message['role'] != 'assistant' and message['content'].strip() not in text:
      other = message | {'content': message['content'] + ' x'}
    if other is not None and not changes([*messages[:i], other, *messages[i + 1 :]], tools):
      left_out = f'the{what or " content"} of message {i}, of role {message["role"]!r}'
  if left_out:
    raise ValueError(
      f'the chat template leaves out {left_out}, and the model would never see it: take a template '
      'that writes it, or leave it out of the data'
    )


def _check_markers(tokenizer, messages: Sequence[Message], text: str) -> None:
  """Raises a ValueError if a marker such as <|user|>, which the template writes, is no token."""
  contents = json.dumps(messages, ensure_ascii=False)
  for marker in sorted(_markers(text) - _markers(contents)):
    if tokenizer.encoder.token_to_id(marker) is None:
      raise ValueError(
        f'the chat template writes {marker!r}, which is no token of this tokenizer: it needs the '
        'special tokens that its template was made for'
      )


def _markers(text: str) -> set[str]:
  return set(re.findall(r'<\|[^|<>\s]+\|>', text))
