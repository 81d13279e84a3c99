"""Labels of images or texts."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jpeft import data

from .metrics import registered_scores
from .task import Task, loss


class Numbered:
  """A source whose examples also say their number, so that a batch can be told."""

  def __init__(self, source):
    self._source, self.classes = source, source.classes

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, i: int) -> dict:
    return self._source[i] | {'index': i}


def source(config, split: str) -> data.Source:
  """The examples of a split.

  Raises:
    ValueError, OSError, RuntimeError: no such data, or not as many labels as the config says.
  """
  found = data.load(config.data.name, split, config.data.dir)
  classes = found.classes
  if not classes:
    raise ValueError(
      f"{config.data.name} has no labels, but texts to write: set config.task='language'"
    )
  if config.model.num_classes not in (None, len(classes)):
    raise ValueError(
      f'config.model.num_classes is {config.model.num_classes}, but {config.data.name} has '
      f'{len(classes)} labels: {", ".join(classes[:10])}'
    )
  return data.in_memory(found) if config.data.in_memory else found


def rows(config, pretrained, source, training: bool) -> tuple[Numbered, Callable]:
  """(numbered examples, their `transform`)."""
  return Numbered(source), transform(config, pretrained, training)


def transform(config, pretrained, training: bool) -> Callable:
  """(example, rng) -> arrays for the model: an image as the backbone was trained on, or tokens.

  Raises:
    ValueError: the backbone reads texts and has no tokenizer.json.
  """
  if pretrained.preprocess is not None:
    return data.image_transform(
      **pretrained.preprocess,
      resize=config.data.resize,
      augment=config.data.augment if training else 'none',
    )
  if pretrained.tokenizer is None:
    raise ValueError(f'{config.model.source} has no tokenizer.json, so texts cannot be read')
  return data.text_transform(pretrained.tokenizer, config.data.max_length)


def blank(config, pretrained) -> dict[str, np.ndarray]:
  """A batch of one empty example."""
  label = np.zeros(1, np.int32)
  if pretrained.preprocess is not None:
    size = pretrained.preprocess['image_size']
    return {'image': np.zeros((1, size, size, 3), np.float32), 'label': label}
  tokens = np.zeros((1, config.data.max_length), np.int32)
  return {
    'tokens': tokens,
    'token_mask': np.ones(tokens.shape, bool),
    'types': tokens,
    'label': label,
  }


def tally(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
  """Of logits [B, C] and labels [B], loss: the sum over examples; confusion: [C, C] counts, by
  label and prediction.
  """
  classes, keep = logits.shape[-1], mask.astype(jnp.float32)
  true, guess = (jax.nn.one_hot(i, classes) for i in (labels, logits.argmax(-1)))
  confusion = jnp.einsum('bt,bg,b->tg', true, guess, keep)
  return {'loss': (loss(logits, labels) * keep).sum(), 'confusion': confusion}


def scores(tally: dict[str, np.ndarray]) -> dict[str, float]:
  """accuracy, macro_f1 (over the labels that occur or are predicted) and loss of a summed tally."""
  confusion = np.asarray(tally['confusion'], np.float64)
  hits, total = np.diag(confusion), confusion.sum()
  seen = confusion.sum(0) + confusion.sum(1)
  f1 = 2 * hits[seen > 0] / seen[seen > 0]
  found = {'accuracy': hits.sum() / total, 'macro_f1': f1.mean(), 'loss': tally['loss'] / total}
  own = {name: float(value) for name, value in found.items()}
  return own | registered_scores('classification', tally)


CLASSIFICATION = Task(source, rows, blank, tally, scores)
