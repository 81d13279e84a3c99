"""Questions on texts in rows of tokens: a long text has several windows, which overlap."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from .source import Example
from .text import Encoder, TokenRow, row_of

ABSENT = (0, 0)  # the label of a window without the answer: its first token, the class token


@dataclasses.dataclass(frozen=True)
class Window:
  """A question with a part of its text.

  Attributes:
    row: the tokens.
    example: number of the question.
    label: the first and the last token of the answer, or ABSENT.
    offsets: int32 [n, 2], the first character in the text of each token and the one after its last;
      -1 for tokens that are not of the text.
  """

  row: TokenRow
  example: int
  label: tuple[int, int]
  offsets: np.ndarray


class Windows:
  """A source of rows, a window each, those of a question one after the other.

  Attributes:
    classes: empty: answers have no labels.
    examples: the questions.
    windows: of all questions.
    about: a line with the numbers of questions and windows, and of windows without an answer.
  """

  def __init__(self, source, encoder: Encoder, stride: int, arrays: Sequence[str]):
    """Encodes all questions.

    Args:
      source: len and [i] -> {'question', 'context'} and, to learn, 'answers': [(text, start)].
      encoder: of the backbone.
      stride: tokens of the text that two windows share.
      arrays: those of a row that the model takes, of 'tokens', 'token_mask' and 'types'.

    Raises:
      ValueError: a question that leaves no room for the text, or a token that the model has no row
        for.
    """
    self.classes = []
    self.examples = [source[i] for i in range(len(source))]
    self.windows: list[Window] = []
    self._encoder = encoder
    self._arrays = arrays
    # An encoder of its own: how texts are cut is a setting of the tokenizer.
    encoder.tokenizer.enable_truncation(encoder.length, stride=stride, strategy='only_second')
    special = encoder.tokenizer.num_special_tokens_to_add(is_pair=True)
    for number, example in enumerate(self.examples):
      question = example['question'].strip()
      asked = encoder.tokenizer.encode(question, add_special_tokens=False)
      room = encoder.length - special - len(asked.ids) - len(asked.overflowing)
      if asked.overflowing or room <= stride:
        raise ValueError(
          f'example {number}: the question {question[:40]!r} leaves less room for its text than '
          f'the {stride} tokens that windows share, of {encoder.length}: raise data.max_length, or '
          'lower data.stride'
        )
      try:
        parts = encoder.parts(question, example['context'])
      except ValueError as error:
        raise ValueError(f'example {number}: {error}') from error
      answers = example.get('answers') or []
      self.windows += [_window(number, part, answers) for part in parts]
    unanswered = sum(window.label == ABSENT for window in self.windows)
    self.about = f'{len(source):,} questions in {len(self.windows):,} windows'
    if unanswered:
      self.about += f', {unanswered:,} of them without an answer'

  def __len__(self) -> int:
    return len(self.windows)

  def __getitem__(self, i: int) -> Example:
    """Row i.

    Returns:
      the arrays of `text_transform` that the model takes; 'label': int32 [2], the first and the
      last token of the answer; 'index': the number of its question.
    """
    window = self.windows[i]
    arrays = self._encoder.filled(window.row)
    taken = {name: arrays[name] for name in self._arrays}
    return taken | {'label': np.array(window.label, np.int32), 'index': window.example}


def _window(number: int, encoding, answers: Sequence[tuple[str, int]]) -> Window:
  offsets = np.array(encoding.offsets, np.int32).reshape(-1, 2)
  is_text = np.array([owner == 1 for owner in encoding.sequence_ids], bool)
  offsets[~is_text] = -1
  label = ABSENT
  if answers:
    text, start = answers[0]
    label = _label(offsets, is_text, start, start + len(text))
  return Window(row_of(encoding), number, label, offsets)


def _label(offsets: np.ndarray, is_text: np.ndarray, start: int, end: int) -> tuple[int, int]:
  """(first, last) token of the characters [start, end), or ABSENT where some are not there.

  The first is the last token that begins at or before them, the last the first one that ends at or
  after them.
  """
  places = np.flatnonzero(is_text)
  if not len(places) or offsets[places[0], 0] > start or offsets[places[-1], 1] < end:
    return ABSENT
  first = places[offsets[places, 0] <= start][-1]
  last = places[offsets[places, 1] >= end][0]
  return int(first), int(max(first, last))
