"""From texts to tokens of a fixed length."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jpeft import tokenizer_json
from jpeft.lazy import extra
from jpeft.messages import no_row

from .conventions import PADS
from .source import Example, Transform

with extra('llm'):
  from tokenizers import Tokenizer


def text_transform(
  tokenizer: Tokenizer | str | Path,
  max_length: int,
  pad_token: str | None = None,
  vocabulary: int | None = None,
  types: int | None = None,
) -> Transform:
  """Turns {'text', ['pair'], 'label'} into arrays of `max_length` tokens, cut or padded at the end.

  Args:
    tokenizer: of the `tokenizers` package, or the path of a tokenizer.json; it stays as it is.
    max_length: tokens kept, special ones included.
    pad_token: the token of the padding. If left out, the tokenizer's own, else whichever of [PAD],
      <pad>, ... it knows.
    vocabulary: rows of the model's table of tokens; None if not known. A text with a token beyond
      it is a ValueError, since JAX would read it as NaN.
    types: the same of its table of segments.

  Returns:
    A transform for `Batches`: (example, rng) -> {'tokens': int32 [max_length], 'token_mask': bool
    [max_length], False at padding, 'types': int32 [max_length], 1 at the second text of a pair,
    'label'}.

  Raises:
    FileNotFoundError: no such tokenizer.json.
    ValueError: it is not one, it has no pad token or one beyond the table, or max_length leaves no
      room for a token of the text.
  """
  encoder = Encoder(tokenizer, max_length, pad_token, vocabulary, types)

  def transform(example: Example, rng: np.random.Generator | None = None) -> Example:
    encoding = encoder.encode(example['text'], example.get('pair'))
    rest = {name: value for name, value in example.items() if name not in ('text', 'pair')}
    return encoder.filled(row_of(encoding)) | rest

  return transform


@dataclasses.dataclass(frozen=True)
class TokenRow:
  """A row of tokens before it is filled up: `tokens` and `types`, int32 [n] each."""

  tokens: np.ndarray
  types: np.ndarray


def row_of(encoding: Any) -> TokenRow:
  """The tokens of an encoding of `tokenizers`."""
  return TokenRow(np.array(encoding.ids, np.int32), np.array(encoding.type_ids, np.int32))


class Encoder:
  """A tokenizer that makes rows of tokens for a model.

  Attributes:
    tokenizer: of `tokenizers`; a copy, without padding, that cuts texts to `length`.
    length: tokens of a row.
  """

  def __init__(
    self,
    tokenizer: Tokenizer | str | Path,
    max_length: int,
    pad_token: str | None = None,
    vocabulary: int | None = None,
    types: int | None = None,
  ):
    """Arguments and errors are those of `text_transform`."""
    if isinstance(tokenizer, Tokenizer):
      # A copy: truncation and padding are settings of the object itself.
      tokenizer = Tokenizer.from_str(tokenizer.to_str())
    else:
      tokenizer = _read(tokenizer)
    special = tokenizer.num_special_tokens_to_add(is_pair=False)
    if max_length <= special:
      raise ValueError(f'max_length={max_length} leaves no room beside {special} special tokens')
    self._pad = tokenizer.token_to_id(_pad(tokenizer, pad_token))
    self._vocabulary = vocabulary
    self._types = types
    self.tokenizer = tokenizer
    self.length = max_length
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    if vocabulary is not None:
      _check_ids([self._pad], vocabulary, tokenizer, 'the padding')

  def parts(self, text: str, pair: str | None = None) -> list[Any]:
    """The encodings of a whole text or pair, as many as are needed; raises as `encode` does."""
    encoding = self.encode(text, pair)
    for part in encoding.overflowing:
      self.check(part, text)
    return [encoding, *encoding.overflowing]

  def encode(self, text: str, pair: str | None = None) -> Any:
    """The encoding of a text or a pair, which `tokenizers` makes; what does not fit is cut off.

    Raises:
      ValueError: no text, or a token or a segment that the model has no row for.
    """
    with tokenizer_json.sentences(f'{text!r:.60} is no text that a tokenizer reads'):
      encoding = self.tokenizer.encode(text, pair)
    self.check(encoding, text)
    return encoding

  def check(self, encoding: Any, text: str) -> None:
    """Raises a ValueError for what a model cannot read: no token, or one that it has no row for.

    Args:
      encoding: of a text or a pair.
      text: for the message.
    """
    if self._vocabulary is not None:
      _check_ids(encoding.ids, self._vocabulary, self.tokenizer, repr(text[:40]))
    segment = max(encoding.type_ids, default=0)
    if self._types is not None and segment >= self._types:
      raise ValueError(
        f'the tokenizer gives the second text of a pair the segment {segment}, and '
        f'the model has rows for {self._types}: pairs need another model or tokenizer'
      )
    if not encoding.ids:
      raise ValueError(f'{text[:40]!r} has no token, and a model cannot read nothing')

  def filled(self, row: TokenRow) -> Example:
    """{'tokens', 'token_mask', 'types'} of a row, filled up to `length`; see `text_transform`."""
    count = len(row.tokens)
    tokens = np.full(self.length, self._pad, np.int32)
    types = np.zeros(self.length, np.int32)
    tokens[:count] = row.tokens
    types[:count] = row.types
    return {'tokens': tokens, 'token_mask': np.arange(self.length) < count, 'types': types}


def _check_ids(ids: Sequence[int], vocabulary: int, tokenizer: Tokenizer, where: str) -> None:
  """Raises a ValueError if a token is beyond the table of the model.

  Args:
    ids: of the tokens.
    vocabulary: rows of the table.
    tokenizer: which made them.
    where: what has these tokens, for the message.
  """
  largest = max(ids, default=0)
  if largest >= vocabulary:
    raise ValueError(no_row(where, tokenizer.id_to_token(largest), largest, vocabulary))


def check_texts(source, transform: Transform, tokenizer: str | Path, vocabulary: int) -> None:
  """Raises a ValueError if a text has a token that the model has no row for, or no token at all.

  Only the first text is read if the tokenizer knows no such token and puts special ones around all.

  Args:
    source: len and [i] -> {'text', ['pair'], ...}.
    transform: from `text_transform`, with this vocabulary.
    tokenizer: its tokenizer.json.
    vocabulary: rows of the model's table of tokens.
  """
  count = len(source)
  encoder = _read(tokenizer)
  knows_more = max(encoder.get_vocab().values()) >= vocabulary
  if not knows_more and encoder.num_special_tokens_to_add(is_pair=False):
    count = min(count, 1)
  for i in range(count):
    try:
      transform(source[i])
    except ValueError as error:
      raise ValueError(f'example {i}: {error}') from error


def _read(path: str | Path) -> Tokenizer:
  """The tokenizer of a tokenizer.json."""
  if not Path(path).exists():
    raise FileNotFoundError(f'there is no tokenizer file {path}')
  return tokenizer_json.read(Path(path))


def _pad(tokenizer: Tokenizer, name: str | None) -> str:
  """The token that fills up short texts."""
  wanted = list(PADS)
  if tokenizer.padding:
    wanted.insert(0, tokenizer.padding['pad_token'])
  if name:
    wanted = [name]
  for token in wanted:
    if tokenizer.token_to_id(token) is not None:
      return token
  raise ValueError(
    f'the tokenizer has no pad token ({", ".join(wanted)} are not in its vocabulary of '
    f'{tokenizer.get_vocab_size()}); name one of its tokens with pad_token='
  )
