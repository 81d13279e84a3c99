"""What training makes small: a loss of each label, and how much the label counts in the mean."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Objective:
  """The weighed mean of a loss of each label, sum(weights * losses) / sum(weights) of a batch.

  Micro-batches are summed and divided once, so that they give the mean of the whole batch.

  Attributes:
    losses: (outputs, labels) -> [...] in float32, finite also where a label does not count.
    right: (outputs, labels) -> [...] bool, whether the output gives the label; None where no output
      is right or wrong. A log then has no accuracy.
    weights: labels -> [...] in float32 and at least 0, of the shape of the losses. A label that is
      not known, or not to be learned, has 0.
    smoothing: of a plain softmax over classes, which can be made in pieces (`in_pieces`); None for
      any other loss.
  """

  losses: Callable[[Any, jax.Array], jax.Array]
  right: Callable[[Any, jax.Array], jax.Array] | None
  weights: Callable[[jax.Array], jax.Array]
  smoothing: float | None = None

  def sum(self, outputs: Any, labels: jax.Array) -> jax.Array:
    """The sum of weights * losses, a scalar."""
    return (self.weights(labels) * self.losses(outputs, labels)).sum()


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


def softmax(smoothing: float = 0.0) -> Objective:
  """Softmax cross-entropy of labels that are integers; negative ones are not learned.

  Args:
    smoothing: the share of the target that all labels get alike.
  """

  def losses(logits, labels):
    return loss(logits, labels, smoothing)

  return Objective(losses, likeliest, known, smoothing)


def likeliest(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Whether the largest of the logits [..., C] is that of a label [...] that is not negative."""
  return (logits.argmax(-1) == labels) & (labels >= 0)


def known(labels: jax.Array) -> jax.Array:
  """1 for integers from 0 on, 0 for negative ones."""
  return (labels >= 0).astype(jnp.float32)
