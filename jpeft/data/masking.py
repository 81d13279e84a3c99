"""Texts with masked words (BERT, arXiv:1810.04805): of those chosen 80 % are masked, 10 % replaced.

The other 10 % stay as they are, and are to be named all the same.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jpeft import jsonfiles, tokenizer_json

from .packing import IGNORED
from .source import Example
from .text import Encoder, TokenRow, row_of

MASKS = ('[MASK]', '<mask>')
MASKED, REPLACED = 0.8, 0.1  # shares of the words that are chosen


@dataclasses.dataclass(frozen=True)
class _Row:
  """A row: its tokens, the number of its text, and bool [n], which of them may be masked."""

  row: TokenRow
  example: int
  free: np.ndarray


class MaskableTexts:
  """A source of rows; a text that is longer than a row has several, one after the other.

  Attributes:
    classes: empty: words are no labels.
    about: a line with the numbers of texts and rows, and of texts that were left out.
  """

  def __init__(self, source, encoder: Encoder, arrays: Sequence[str]):
    """Encodes all texts.

    Args:
      source: len and [i] -> {'text', ['pair']}; a pair is one text, of the two.
      encoder: of the backbone.
      arrays: those of a row that the model takes, of 'tokens', 'token_mask' and 'types'.

    Raises:
      ValueError: a token that the model has no row for, or no text with a word to mask.
    """
    self.classes = []
    self._encoder = encoder
    self._arrays = arrays
    self._rows: list[_Row] = []
    special = special_ids(encoder)
    left_out = 0
    words = 0
    for number in range(len(source)):
      example = source[number]
      text = ' '.join(example[name] for name in ('text', 'pair') if example.get(name))
      count = len(self._rows)
      try:
        parts = encoder.parts(text)
      except ValueError as error:
        raise ValueError(f'example {number}: {error}') from error
      for part in parts:
        row = row_of(part)
        free = (np.array(part.special_tokens_mask) == 0) & ~np.isin(row.tokens, special)
        words += int(free.sum())
        if free.any():
          self._rows.append(_Row(row, number, free))
      left_out += len(self._rows) == count
    if not self._rows:
      raise ValueError(f'of {len(source)} texts none has a word that could be masked')
    self.about = (
      f'{len(source) - left_out:,} texts of {words:,} tokens in {len(self._rows):,} rows of up to '
      f'{encoder.length}'
    )
    if left_out:
      self.about += f'; {left_out:,} left out, without a word to mask'

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, i: int) -> Example:
    """Row i, of which nothing is masked yet.

    Returns:
      the arrays of `text_transform` that the model takes; 'free': bool [length], the words that may
      be masked; 'row': i; 'index': the number of its text.
    """
    row = self._rows[i]
    arrays = self._encoder.filled(row.row)
    free = np.zeros(self._encoder.length, bool)
    free[: len(row.free)] = row.free
    taken = {name: arrays[name] for name in self._arrays}
    return taken | {'free': free, 'row': i, 'index': row.example}


@dataclasses.dataclass(frozen=True)
class Masking:
  """The transform of `MaskableTexts`: chooses words anew each time, or always the same ones.

  Attributes:
    mask: the token that stands for a masked word.
    words: int32, the tokens that may replace one.
    share: of the words that are chosen; of any row at least one is.
    fixed: whether the number of the row decides what is chosen, for evaluations.
  """

  mask: int
  words: np.ndarray
  share: float = 0.15
  fixed: bool = False

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    """The arrays of a row: 'tokens' with masks, and 'label', the word at each that was chosen."""
    rest = {name: value for name, value in example.items() if name not in ('free', 'row')}
    if self.fixed:
      seed = np.random.SeedSequence(0, spawn_key=(example['row'],))
      rng = np.random.Generator(np.random.Philox(seed))
    tokens = example['tokens']
    places = np.flatnonzero(example['free'])
    count = max(1, round(self.share * len(places)))
    chosen = places[np.argsort(rng.random(len(places)), kind='stable')[:count]]
    label = np.full(len(tokens), IGNORED, np.int32)
    label[chosen] = tokens[chosen]
    tokens = tokens.copy()
    fate = rng.random(count)
    others = self.words[(rng.random(count) * len(self.words)).astype(int)]
    masked = fate < MASKED
    replaced = ~masked & (fate < MASKED + REPLACED)
    tokens[chosen[masked]] = self.mask
    tokens[chosen[replaced]] = others[replaced]
    return rest | {'tokens': tokens, 'label': label}


def masking_of(
  encoder: Encoder, path: str | Path, vocabulary: int | None, share: float, fixed: bool
) -> Masking:
  """The `Masking` of a tokenizer.

  Args:
    encoder: of the backbone.
    path: of its tokenizer.json, beside which tokenizer_config.json may name the mask.
    vocabulary: rows of the model's table of tokens; None if not known.
    share, fixed: see `Masking`.

  Raises:
    ValueError: the tokenizer has no mask.
  """
  special = special_ids(encoder)
  ids = set(encoder.tokenizer.get_vocab().values()) - set(special.tolist())
  mask = mask_of(encoder, path)
  words = sorted(i for i in ids if i != mask and (vocabulary is None or i < vocabulary))
  return Masking(mask, np.array(words, np.int32), share, fixed)


def mask_of(encoder: Encoder, path: str | Path) -> int:
  """The token that stands for a masked word; raises a ValueError where there is none."""
  names = list(MASKS)
  file = Path(path).with_name('tokenizer_config.json')
  if file.exists():
    config = jsonfiles.read(file, tokenizer_json.CONFIG)
    named = tokenizer_json.special_tokens(config, file).get('mask_token')
    if named:
      names.insert(0, named)
  for name in names:
    found = encoder.tokenizer.token_to_id(name)
    if found is not None:
      return found
  raise ValueError(
    f'{path} has no token for a masked word ({", ".join(names)}): masked words need the tokenizer '
    'of a model that was trained with them'
  )


def special_ids(encoder: Encoder) -> np.ndarray:
  """The tokens that are no words: those of the tokenizer that are marked as special."""
  added = encoder.tokenizer.get_added_tokens_decoder()
  return np.array([i for i, token in added.items() if token.special], np.int32)
