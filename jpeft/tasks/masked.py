"""Masked words: texts alone, in which words are hidden and named again."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jpeft import data

from . import language
from .metrics import further_scores
from .task import NO_FACTS, Answer, Facts, Task
from .texts import arrays_of, check_entries, check_unlabelled, encoder_of

TOLD = 5  # words that `jpeft predict` names for each mask


def source(config, split: str) -> data.Source:
  """The texts of a split; labels that they may have are left out.

  Raises:
    ValueError, OSError, RuntimeError: no such data, or data without texts.
  """
  found = data.load(config.data.name, split, config.data.dir, 'nothing')
  check_entries(config, found, ('text',))
  check_unlabelled(config)
  return dataclasses.replace(found, classes=[])


def rows(
  config, pretrained, source, training: bool, facts: Facts = NO_FACTS
) -> tuple['data.MaskableTexts', Callable]:
  """(rows of tokens, the function that masks them): anew each epoch, or always alike in tests.

  Raises:
    ValueError: the backbone has no tokenizer, or one without a mask; or a text cannot be read.
  """
  encoder = encoder_of(config, pretrained)
  mask = data.masking_of(
    encoder,
    pretrained.tokenizer,
    pretrained.config.get('vocab_size'),
    config.data.masked,
    fixed=not training,
  )
  return data.MaskableTexts(source, encoder, tuple(arrays_of(config, pretrained))), mask


def example(config, pretrained, outputs: int = 0) -> dict[str, np.ndarray]:
  """A batch of one empty row.

  Raises:
    ValueError: the backbone does not read texts.
  """
  arrays = arrays_of(config, pretrained)
  return arrays | {'label': np.zeros((1, config.data.max_length), np.int32)}


def scores(
  tally: dict[str, np.ndarray], names: Sequence[str] = (), facts: Facts = NO_FACTS
) -> dict[str, float]:
  """perplexity, loss and accuracy of the chosen words, and registered metrics.

  Args:
    tally: as that of texts to write.
    names, facts: see `Task.scores`.
  """
  return language.of_tokens(tally) | further_scores('masked', tally, names)


# ---- What a model says of texts with masks.


class _Lines:
  """A source of rows, a text with masks each."""

  def __init__(self, examples: Sequence[dict], encoder: 'data.Encoder', mask: int, names):
    self._encoder = encoder
    self._names = names
    self.encodings = []
    self.places = []  # of the masks
    word = encoder.tokenizer.id_to_token(mask)
    for example in examples:
      text = example['text']
      encoding = encoder.encode(text)
      places = np.flatnonzero(np.array(encoding.ids) == mask)
      if not len(places):
        raise ValueError(f'{text!r:.60} has no {word}: write it in place of a word')
      if any(mask in part.ids for part in encoding.overflowing):
        raise ValueError(
          f'{text!r:.60} has a {word} beyond the {encoder.length} tokens of the run '
          '(data.max_length): shorten it'
        )
      self.encodings.append(encoding)
      self.places.append(places)

  def __len__(self) -> int:
    return len(self.encodings)

  def __getitem__(self, i: int) -> dict:
    arrays = self._encoder.filled(data.row_of(self.encodings[i]))
    return {name: arrays[name] for name in self._names}

  def word(self, number: int) -> str:
    """How a token is read, by itself."""
    return self._encoder.tokenizer.decode([number], skip_special_tokens=False).strip()


def asked(config, pretrained, examples: Sequence[dict]) -> tuple[_Lines, None]:
  """The rows of texts with masks."""
  encoder = encoder_of(config, pretrained)
  mask = data.mask_of(encoder, pretrained.tokenizer)
  return _Lines(examples, encoder, mask, tuple(arrays_of(config, pretrained))), None


def predicted(logits: jax.Array, batch, facts: Facts) -> dict[str, jax.Array]:
  """The likeliest words of each token, and their probabilities, [B, N, TOLD] each."""
  most = min(TOLD, logits.shape[-1])
  probability, word = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32)), most)
  return {'word': word, 'probability': probability}


def answers(
  config, outputs: dict[str, np.ndarray], rows: _Lines, examples, labels, facts: Facts
) -> list[Answer]:
  """The likeliest words of each mask of each text."""
  found = []
  for i, places in enumerate(rows.places):
    masks = []
    for place in places:
      words = [rows.word(int(number)) for number in outputs['word'][i, place]]
      probability = map(float, outputs['probability'][i, place])
      masks.append(
        [{'word': word, 'probability': p} for word, p in zip(words, probability, strict=True)]
      )
    columns = [f'{words[0]["word"]} {words[0]["probability"]:.4f}' for words in masks]
    found.append(Answer(tuple(columns), {'masks': masks}))
  return found


MASKED = Task(
  source,
  rows,
  example,
  language.tally,
  scores,
  untuned=True,
  tally_losses=language.tally_losses,
  head='masked',
  outputs=lambda labels: 0,
  asked=asked,
  predicted=predicted,
  answers=answers,
)
