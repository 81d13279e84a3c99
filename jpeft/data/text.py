"""From texts to tokens of a fixed length."""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from .source import Example, Transform

PADS = ('[PAD]', '<pad>', '<|pad|>', '<|padding|>')


def text_transform(
  tokenizer: Tokenizer | str | Path, max_length: int, pad_token: str | None = None
) -> Transform:
  """Turns {'text', ['pair'], 'label'} into arrays of `max_length` tokens, cut or padded at the end.

  Args:
    tokenizer: of the `tokenizers` package, or the path of a tokenizer.json; it stays as it is.
    max_length: tokens kept, special ones included.
    pad_token: the token of the padding. If left out, the tokenizer's own, else whichever of [PAD],
      <pad>, ... it knows.

  Returns:
    A transform for `Batches`: (example, rng) -> {'tokens': int32 [max_length], 'token_mask': bool
    [max_length], False at padding, 'types': int32 [max_length], 1 at the second text of a pair,
    'label'}.

  Raises:
    FileNotFoundError: no such tokenizer.json.
    ValueError: it is not one, it has no pad token, or max_length leaves no room for a token of the
      text.
  """
  if isinstance(tokenizer, Tokenizer):
    # A copy: truncation and padding are settings of the object itself.
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
  else:
    tokenizer = _read(tokenizer)
  special = tokenizer.num_special_tokens_to_add(is_pair=False)
  if max_length <= special:
    raise ValueError(f'max_length={max_length} leaves no room beside {special} special tokens')
  pad = _pad(tokenizer, pad_token)
  tokenizer.enable_truncation(max_length)
  tokenizer.enable_padding(pad_id=tokenizer.token_to_id(pad), pad_token=pad, length=max_length)

  def transform(example: Example, rng: np.random.Generator | None = None) -> Example:
    encoding = tokenizer.encode(example['text'], example.get('pair'))
    rest = {name: value for name, value in example.items() if name not in ('text', 'pair')}
    arrays = {
      'tokens': np.array(encoding.ids, np.int32),
      'token_mask': np.array(encoding.attention_mask, bool),
      'types': np.array(encoding.type_ids, np.int32),
    }
    return arrays | rest

  return transform


def _read(path: str | Path) -> Tokenizer:
  """The tokenizer of a tokenizer.json."""
  if not Path(path).is_file():
    raise FileNotFoundError(f'there is no tokenizer file {path}')
  try:
    return Tokenizer.from_file(str(path))
  except Exception as error:  # the package raises bare Exceptions
    raise ValueError(f'{path} is no tokenizer.json ({error})') from error


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
