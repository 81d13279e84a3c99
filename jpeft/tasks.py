"""Classification of images or texts: what goes into the model, what is learnt, how it is scored."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import data


class Numbered:
  """A source whose examples also say their number, so that a batch can be told."""

  def __init__(self, source):
    self._source, self.classes = source, source.classes

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, i: int) -> dict:
    return self._source[i] | {'index': i}


def source(config, split: str) -> Numbered:
  """The examples of a split.

  Raises:
    ValueError, OSError, RuntimeError: no such data, or not as many labels as the config says.
  """
  found = data.load(config.data.name, split, config.data.dir)
  classes = found.classes
  if config.model.num_classes not in (None, len(classes)):
    raise ValueError(f'config.model.num_classes is {config.model.num_classes}, but {config.data.name} has '
                     f'{len(classes)} labels: {", ".join(classes[:10])}')
  return Numbered(data.in_memory(found) if config.data.in_memory else found)


def transform(config, pretrained, training: bool) -> Callable:
  """(example, rng) -> arrays for the model: an image as the backbone was trained on, or tokens.

  Raises:
    ValueError: the backbone reads texts and has no tokenizer.json.
  """
  if pretrained.preprocess is not None:
    return data.image_transform(**pretrained.preprocess, resize=config.data.resize,
                                augment=config.data.augment if training else 'none')
  if pretrained.tokenizer is None:
    raise ValueError(f'{config.model.source} has no tokenizer.json, so texts cannot be read')
  return data.text_transform(pretrained.tokenizer, config.data.max_length)


def inputs(batch: dict) -> tuple[tuple, dict]:
  """(args, kwargs) of the model's call for a batch."""
  if 'image' in batch:
    return (batch['image'],), {}
  given = {name: batch[key] for name, key in (('mask', 'token_mask'), ('types', 'types')) if key in batch}
  return (batch['tokens'], *([batch['decoder_tokens']] if 'decoder_tokens' in batch else [])), given


def blank(config, pretrained) -> dict[str, np.ndarray]:
  """A batch of one empty example: the shapes to attach a method and to compile with."""
  label = np.zeros(1, np.int32)
  if pretrained.preprocess is not None:
    size = pretrained.preprocess['image_size']
    return {'image': np.zeros((1, size, size, 3), np.float32), 'label': label}
  tokens = np.zeros((1, config.data.max_length), np.int32)
  return {'tokens': tokens, 'token_mask': np.ones(tokens.shape, bool), 'types': tokens, 'label': label}


def loss(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
  """Softmax cross-entropy of each example, in float32.

  Args:
    logits: [B, C].
    labels: [B] integers.
    smoothing: the share of the target that all labels get alike.

  Returns:
    [B], in nats.
  """
  target = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
  return optax.softmax_cross_entropy(logits.astype(jnp.float32), target)


def tally(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
  """What `scores` needs of one batch; tallies of batches are added.

  Args:
    logits: [B, C].
    labels: [B] integers.
    mask: [B], False for rows that only fill up the last batch.

  Returns:
    loss: the sum over examples; confusion: [C, C] counts, by label and prediction.
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
  return {name: float(value) for name, value in found.items()}


def best(metric: str, rows: list[dict]) -> dict:
  """The evaluation that is best by a metric, the first of equals; a loss is better when it is lower."""
  return min(rows, key=lambda row: row[metric] if metric == 'loss' else -row[metric])


def better(metric: str, new: dict, rows: list[dict]) -> bool:
  """Whether an evaluation is better than all before it."""
  return best(metric, [*rows, new]) is new
