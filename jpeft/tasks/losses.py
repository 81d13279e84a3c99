"""What training makes small: a loss of each label, and how much the label counts in the mean.

focal loss    (1 - p)^gamma * -log p of the probability p that is given to what is right (Lin et
              al., Focal Loss for Dense Object Detection, arXiv 1708.02002)
huber loss    d^2 / 2 of a distance d up to 1, and |d| - 1/2 beyond
"""

import dataclasses
from collections.abc import Callable, Sequence
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
    pairs: of tasks whose rows are two texts, see `preferences`: outputs are then their rewards.
      None for any other task.
    distances: (outputs, told, labels) -> [...] in float32, how far outputs are from other outputs
      of the same batch, for methods that learn from a pass of their own; None where there is no
      such measure.
  """

  losses: Callable[[Any, jax.Array], jax.Array]
  right: Callable[[Any, jax.Array], jax.Array] | None
  weights: Callable[[jax.Array], jax.Array]
  smoothing: float | None = None
  distances: Callable[[Any, Any, jax.Array], jax.Array] | None = None
  pairs: Any = None

  def sum(self, outputs: Any, labels: jax.Array) -> jax.Array:
    """The sum of weights * losses, a scalar."""
    return (self.weights(labels) * self.losses(outputs, labels)).sum()

  def distance(self, outputs: Any, told: Any, labels: jax.Array) -> jax.Array:
    """The sum of weights * distances from other outputs, a scalar.

    Raises:
      ValueError: the task has no such measure.
    """
    if self.distances is None:
      raise ValueError(
        'the method learns from the outputs of a pass of its own, and the loss of this task does '
        'not say how far two outputs are apart (Objective.distances)'
      )
    return (self.weights(labels) * self.distances(outputs, told, labels)).sum()


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


def loss_of_teacher(
  logits: jax.Array, told: jax.Array, labels: jax.Array, temperature: float | jax.Array = 1.0
) -> jax.Array:
  """temperature^2 KL(teacher, model) of each label, in float32; 0 where a label is negative.

  Of the softmax of logits / temperature (Hinton et al., Distilling the Knowledge in a Neural
  Network, arXiv 1503.02531).

  Args:
    logits: [..., C] of the model.
    told: [..., C] of the teacher.
    labels: [...] integers.
    temperature: above 0; the higher, the more the unlikely words count.

  Returns:
    [...], in nats.
  """

  @jax.checkpoint  # logits are kept in their own dtype
  def divergence(logits, told):
    logits, told = (
      jax.nn.log_softmax(x.astype(jnp.float32) / temperature, -1) for x in (logits, told)
    )
    chance = jnp.exp(told)
    return temperature**2 * jnp.where(chance > 0, chance * (told - logits), 0).sum(-1)

  return jnp.where(labels < 0, 0.0, divergence(logits, told))


def softmax(
  smoothing: float = 0.0, class_weights: Sequence[float] | None = None, focal: float = 0.0
) -> Objective:
  """Softmax cross-entropy of labels that are integers; negative ones are not learned.

  Args:
    smoothing: the share of the target that all labels get alike.
    class_weights: [C], the weight of a label of each class in the mean; 1 for all if left out.
    focal: gamma of the focal loss; 0 for plain cross-entropy.
  """

  def losses(logits, labels):
    found = loss(logits, labels, smoothing)
    if not focal:
      return found
    return _power(-jnp.expm1(-found), focal) * found

  def weights(labels):
    if class_weights is None:
      return known(labels)
    table = jnp.asarray(class_weights, jnp.float32)
    return known(labels) * table[jnp.maximum(labels, 0)]

  is_plain = class_weights is None and not focal
  return Objective(
    losses, likeliest, weights, smoothing if is_plain else None, distances=loss_of_teacher
  )


def sigmoid(class_weights: Sequence[float] | None = None, focal: float = 0.0) -> Objective:
  """Sigmoid cross-entropy of labels [B, C] that are 1, 0, or NaN where they are not known.

  Args:
    class_weights: [C], how many times a label 1 of each class counts; 1 for all if left out.
    focal: gamma of the focal loss; 0 for plain cross-entropy.
  """

  def losses(logits, labels):
    signs = jnp.where(labels > 0, 1.0, -1.0)
    z = signs * logits.astype(jnp.float32)  # how sure of what is right
    found = jax.nn.softplus(-z)
    if focal:
      found = _power(jax.nn.sigmoid(-z), focal) * found
    if class_weights is not None:
      found = jnp.where(labels > 0, jnp.asarray(class_weights, jnp.float32), 1.0) * found
    return found

  def right(logits, labels):
    return (logits >= 0) == (labels > 0)

  def distances(logits, told, labels):
    """KL of the two probabilities of each label."""
    logits, told = logits.astype(jnp.float32), told.astype(jnp.float32)
    one = jax.nn.sigmoid(told)
    of_one = jax.nn.log_sigmoid(told) - jax.nn.log_sigmoid(logits)
    of_none = jax.nn.log_sigmoid(-told) - jax.nn.log_sigmoid(-logits)
    return one * of_one + (1 - one) * of_none

  return Objective(losses, right, given, distances=distances)


def _power(miss: jax.Array, gamma: float) -> jax.Array:
  """miss^gamma, whose slope stays finite where nothing is missed and gamma is below 1."""
  return jnp.maximum(miss, jnp.finfo(jnp.float32).tiny) ** gamma


def distance(name: str = 'mse') -> Objective:
  """The distance of outputs from labels [B, K] that are numbers, NaN where they are missing.

  Args:
    name: 'mse', 'mae' or 'huber'.
  """
  of_difference = {'mse': jnp.square, 'mae': jnp.abs, 'huber': _huber}[name]

  def losses(outputs, labels):
    there = given(labels) > 0
    return of_difference(jnp.where(there, outputs.astype(jnp.float32) - labels, 0.0))

  def distances(outputs, told, labels):
    return of_difference(outputs.astype(jnp.float32) - told.astype(jnp.float32))

  return Objective(losses, None, given, distances=distances)


def _huber(difference: jax.Array) -> jax.Array:
  size = jnp.abs(difference)
  small = jnp.minimum(size, 1.0)
  return small**2 / 2 + (size - small)


def given(labels: jax.Array) -> jax.Array:
  """1 for numbers, 0 for NaN."""
  return (~jnp.isnan(labels)).astype(jnp.float32)


def likeliest(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Whether the largest of the logits [..., C] is that of a label [...] that is not negative."""
  return (logits.argmax(-1) == labels) & (labels >= 0)


def known(labels: jax.Array) -> jax.Array:
  """1 for integers from 0 on, 0 for negative ones."""
  return (labels >= 0).astype(jnp.float32)
