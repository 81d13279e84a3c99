"""From preferences to rows of tokens: a row has the chosen text, and the rejected one behind it."""

import numpy as np

from .packing import IGNORED, Text, encode
from .readers.preferences import ANSWERS
from .source import Example


class Pairs:
  """A source of rows of 2 `length` tokens: the chosen text in the first half, the rejected after.

  A text that is too long is cut off. A pair is left out if nothing of an answer stays, or if both
  texts are alike.

  Attributes:
    classes: empty: texts have no labels.
    about: a line with the number of pairs, and of what was cut off or left out.
  """

  def __init__(self, source, tokenizer, length: int, chat: bool = False):
    """Reads and encodes all examples.

    Args:
      source: len and [i] -> {'chosen', 'rejected'}, see `preferences`.
      tokenizer: a `models.Tokenizer`.
      length: tokens of a text.
      chat: give prompts as messages of the user and answers as those of the assistant.

    Raises:
      ValueError: a chat that the tokenizer cannot write, or no pair with both answers.
    """
    self.classes: list[str] = []
    self._length = length
    self._pad = tokenizer.pad
    self._rows: list[tuple[int, list[Text]]] = []
    cut = 0
    short = 0
    alike = 0
    for number in range(len(source)):
      example = source[number]
      try:
        texts = [encode(example[part], tokenizer, chat, last=True) for part in ANSWERS]
      except ValueError as error:
        raise ValueError(f'example {number}: {error}') from error
      cut += any(len(tokens) > length for tokens, _ in texts)
      texts = [(tokens[:length], learnt[:length]) for tokens, learnt in texts]
      # The first token is never a label, as no token is before it.
      if not all(learnt[1:].any() for _, learnt in texts):
        short += 1
      elif np.array_equal(texts[0][0], texts[1][0]):
        alike += 1
      else:
        self._rows.append((number, texts))
    if not self._rows:
      raise ValueError(
        f'of {len(source)} pairs none has two different answers within its first {length} tokens; '
        'raise data.max_length'
      )
    self.about = f'{len(self._rows):,} pairs of texts of up to {length} tokens'
    if cut:
      self.about += f'; {cut:,} with a text that is cut off'
    if short:
      self.about += f'; {short:,} left out: an answer begins later'
    if alike:
      self.about += f'; {alike:,} left out: both texts are alike'
    self.about = '; '.join([self.about, *getattr(source, 'notes', ())])

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, i: int) -> Example:
    """Row i.

    Returns:
      'tokens': int32 [2 length].
      'token_mask': int32 [2 length], 1 and 2 for the texts and 0 for padding.
      'label': int32 [2 length], the token after each where that is of an answer, else IGNORED.
      'index': the number of its example.
    """
    number, texts = self._rows[i]
    tokens = np.full((2, self._length), self._pad, np.int32)
    token_mask = np.zeros((2, self._length), np.int32)
    label = np.full((2, self._length), IGNORED, np.int32)
    for half, (text, learnt) in enumerate(texts):
      tokens[half, : len(text)] = text
      token_mask[half, : len(text)] = half + 1
      label[half, : len(text) - 1] = np.where(learnt[1:], text[1:], IGNORED)
    return {
      'tokens': tokens.reshape(-1),
      'token_mask': token_mask.reshape(-1),
      'label': label.reshape(-1),
      'index': number,
    }
