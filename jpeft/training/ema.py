"""A teacher that is the moving average of the model that it teaches.

teacher <- m teacher + (1 - m) theta after each update, of the entries of theta that are trained.
Entries that are not trained, and the backbone, are those of the model itself: the same arrays.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jpeft import tasks
from jpeft.core import Tuned


@dataclasses.dataclass(frozen=True)
class Ema:
  """How a task is taught.

  Attributes:
    teacher: what the task says of it.
    momentum: m of each update: number of updates before it -> m.
    forward: of evaluation, called as a `Forward`.
  """

  teacher: tasks.Teacher
  momentum: Callable[[Any], Any]
  forward: Callable

  def told(self, theta, backbone, batch: dict, key, accumulate: int = 1) -> Any:
    """What the teacher says of a batch.

    Args:
      theta: of the teacher, from `theta_of`.
      backbone: of the model.
      batch: whole; micro-batches are run one after the other.
      key: of the step.
      accumulate: their number.
    """
    shown = self.teacher.shown(batch)

    def run(part):
      return self.forward(theta, backbone, part, key)

    if accumulate == 1:
      outputs = run(shown)
    else:
      parts = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), shown)
      outputs = jax.lax.map(run, parts)
      outputs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)
    return jax.lax.stop_gradient(self.teacher.told(outputs))

  def moved(self, teacher, trained, number) -> Any:
    """The teacher after update `number`, that many being made before; `trained` is after it."""
    rate = 1 - self.momentum(number)

    def between(old, new):
      return old + (rate * (new - old)).astype(old.dtype)

    return jax.tree.map(between, teacher, trained)


def begun(trained) -> Any:
  """The teacher before the first update: what is trained of theta, copied."""
  return jax.tree.map(jnp.copy, trained)


def theta_of(tuned: Tuned, teacher, theta) -> Any:
  """The teacher's theta: its own trained entries, and the others of the model's theta."""
  return tuned.join(teacher, tuned.split(theta)[1])


def entered(tuned: Tuned, teacher, theta) -> Any:
  """The teacher at the beginning of a stage that trains other entries.

  Args:
    tuned: in the stage.
    teacher: at the end of the one before.
    theta: of the model.
  """
  whole = jax.tree.map(
    lambda own, other: other if own is None else own, teacher, theta, is_leaf=lambda x: x is None
  )
  return begun(tuned.split(whole)[0])
