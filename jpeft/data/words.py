"""Sentences as lists of words, in rows of tokens: the tag of a word is that of its first token."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from .packing import IGNORED
from .source import Example
from .text import Encoder, TokenRow, row_of


@dataclasses.dataclass(frozen=True)
class _Sentence:
  """A row: its tokens, its example, and the first token of each of its words.

  Attributes:
    row: the tokens.
    example: number of the example.
    places: int32 [k], where the first token of a word is.
    words: int32 [k], the numbers of these words.
    tags: int32 [k], their tags; empty where they are not known.
  """

  row: TokenRow
  example: int
  places: np.ndarray
  words: np.ndarray
  tags: np.ndarray


class TaggedWords:
  """A source of rows, a sentence each. Words beyond the last token that fits are cut off.

  Attributes:
    classes: names of the tags.
    about: a line with the numbers of sentences and words, and of what was cut off or left out.
  """

  def __init__(self, source, encoder: Encoder, arrays: Sequence[str]):
    """Encodes all sentences.

    Args:
      source: len, classes and [i] -> {'words': [str]} and, to learn, 'label': [int].
      encoder: of the backbone.
      arrays: those of a row that the model takes, of 'tokens', 'token_mask' and 'types'.

    Raises:
      ValueError: a word that the tokenizer or the model cannot read, or no sentence with a token.
    """
    self.classes = source.classes
    self._encoder = encoder
    self._arrays = arrays
    self._rows: list[_Sentence] = []
    self._blank = _needs_blank(encoder.tokenizer)
    words = cut = lost = empty = 0
    for number in range(len(source)):
      example = source[number]
      try:
        sentence, is_cut, without = self._sentence(number, example)
      except ValueError as error:
        raise ValueError(f'example {number}: {error}') from error
      cut += is_cut
      lost += without
      words += len(sentence.words)
      if len(sentence.words):
        self._rows.append(sentence)
      else:
        empty += 1
    if not self._rows:
      raise ValueError(f'of {len(source)} sentences none has a word with a token')
    self.about = f'{len(self._rows):,} sentences of {words:,} words'
    if cut:
      self.about += f'; {cut:,} cut off after {encoder.length} tokens'
    if lost:
      self.about += f'; {lost:,} words cut off or without a token, which have no tag'
    if empty:
      self.about += f'; {empty:,} sentences left out, without a token'

  def _sentence(self, number: int, example: Example) -> tuple[_Sentence, bool, int]:
    """(the row of an example, whether it was cut, how many of its words have no token)."""
    words = example['words']
    encoding = encoded_words(self._encoder, words, self._blank)
    owners = encoding.word_ids
    places = []
    before = None
    for place, owner in enumerate(owners):
      if owner is not None and owner != before:
        places.append(place)
      before = owner
    kept = np.array([owners[place] for place in places], np.int32)
    tags = np.array(example.get('label', ()), np.int32)
    if len(tags):
      if len(tags) != len(words):
        raise ValueError(f'{len(words)} words have {len(tags)} tags')
      if not (0 <= tags.min() and tags.max() < len(self.classes)):
        raise ValueError(
          f'the tags {tags.min()} to {tags.max()}; there are {len(self.classes)}, numbered from 0'
        )
      tags = tags[kept]
    places = np.array(places, np.int32)
    sentence = _Sentence(row_of(encoding), number, places, kept, tags)
    return sentence, bool(encoding.overflowing), len(words) - len(kept)

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, i: int) -> Example:
    """Row i.

    Returns:
      the arrays of `text_transform` that the model takes; 'label': int32 [length], the tag at the
      first token of each word, else IGNORED; 'index': the number of its example.
    """
    sentence = self._rows[i]
    arrays = self._encoder.filled(sentence.row)
    label = np.full(self._encoder.length, IGNORED, np.int32)
    if len(sentence.tags):
      label[sentence.places] = sentence.tags
    taken = {name: arrays[name] for name in self._arrays}
    return taken | {'label': label, 'index': sentence.example}

  def of_words(self, i: int, values: np.ndarray) -> tuple[int, dict[int, Any]]:
    """(the example of row i, {word: its value}) of an array [length, ...] of values of tokens."""
    sentence = self._rows[i]
    return sentence.example, dict(
      zip(sentence.words.tolist(), values[sentence.places], strict=True)
    )


def encoded_words(encoder: Encoder, words: Sequence[str], blank: bool) -> Any:
  """The encoding of words as they stand in a text, whose `word_ids` are their numbers.

  Args:
    encoder: of the backbone.
    words: of a sentence.
    blank: whether the tokenizer has to be given the blanks between them.

  Raises:
    ValueError: no words, or a token that the model has no row for.
  """
  given = list(words)
  if blank:
    given[1:] = [f' {word}' for word in given[1:]]
  try:
    encoding = encoder.tokenizer.encode(given, is_pretokenized=True)
  except TypeError as error:
    raise ValueError(f'{words!r:.60} are no words that a tokenizer reads ({error})') from error
  encoder.check(encoding, ' '.join(words))
  return encoding


def _needs_blank(tokenizer: Any) -> bool:
  """Whether words by themselves get other tokens than in a text, and with a blank the same.

  So it is where a blank is a part of the token after it, as in byte pairs.
  """

  def ids(text: str | list[str]) -> list[int]:
    of_words = isinstance(text, list)
    return tokenizer.encode(text, is_pretokenized=of_words, add_special_tokens=False).ids

  wanted = ids('one two')
  return ids(['one', 'two']) != wanted and ids(['one', ' two']) == wanted
