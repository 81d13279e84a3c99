"""The loss of a task, as a method that says what training minimises gets it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class TaskLoss:
  """loss(out) is the task's loss of an output, a scalar; loss.between(out, told) a distance.

  Attributes:
    of: output -> a scalar.
    between: (output, told) -> a scalar: how far an output is from another one, such as what a
      teacher says of the same batch. For classes it is the mean KL(softmax(told), softmax(out)).
  """

  of: Callable[[Any], jax.Array]
  between: Callable[[Any, Any], jax.Array]

  def __call__(self, out: Any) -> jax.Array:
    return self.of(out)


def divergence(out: jax.Array, told: jax.Array) -> jax.Array:
  """The mean of KL(softmax(told), softmax(out)) of logits [..., C], in float32, in nats."""
  own = jax.nn.log_softmax(out.astype(jnp.float32), -1)
  other = jax.nn.log_softmax(told.astype(jnp.float32), -1)
  return (jnp.exp(other) * (other - own)).sum(-1).mean()
