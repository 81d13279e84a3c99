"""What tasks have in common, and the loss."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Task(NamedTuple):
  """One kind of thing to learn. Its batches have 'label', whose negative entries are not learned.

  Attributes:
    source: (config, split) -> the examples of a split.
    rows: (config, pretrained, source, training) -> (rows, transform), what `Batches` makes batches
      of. Rows have 'index', the number of their first example, and may have `about`, a sentence
      for the report.
    example: (config, pretrained) -> a batch of one empty row: the shapes to attach a method and to
      compile with.
    tally: (logits, labels, mask) -> what `scores` needs of one batch, mask [B] being False for rows
      that only fill up the last one; tallies are added.
    tally_losses: (losses, right, labels, mask) -> the same tally from the loss of each label and
      whether it is the likeliest; None where a tally needs logits.
    scores: (a summed tally, names of further metrics) -> {metric: value}.
    check: (config, tuned) -> nothing; raises a ValueError for a method that the rows do not go
      with.
    written: (config, pretrained, source, write, stop) -> {metric: value} of texts that the model
      writes, {} where it writes none, None if stop() came true; `write` is `generate.completions`
      of the model.
    untuned: whether the untouched model can be scored, so that a report may say what it was before.
  """

  source: Callable[..., Any]
  rows: Callable[..., tuple[Any, Callable | None]]
  example: Callable[..., dict[str, Any]]
  tally: Callable[..., dict[str, jax.Array]]
  scores: Callable[..., dict[str, float]]
  check: Callable[..., None] = lambda *_: None
  written: Callable[..., dict[str, float] | None] = lambda *_: {}
  untuned: bool = False
  tally_losses: Callable[..., dict[str, jax.Array]] | None = None


def loss(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
  """Softmax cross-entropy of each label, in float32; 0 where a label is negative.

  Args:
    logits: [..., C].
    labels: [...] integers.
    smoothing: the share of the target that all labels get alike.

  Returns:
    [...], in nats.
  """

  @jax.checkpoint  # the logits of a large vocabulary are kept once, in their own dtype
  def entropy(logits):
    logits = logits.astype(jnp.float32)
    own = jnp.where(labels[..., None] == jnp.arange(logits.shape[-1]), logits, 0).sum(-1)
    return jax.nn.logsumexp(logits, -1) - (1 - smoothing) * own - smoothing * logits.mean(-1)

  return jnp.where(labels < 0, 0.0, entropy(logits))
