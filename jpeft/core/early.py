"""Some updates within a pass over training examples, for methods that learn what to leave out."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .entries import entry_path
from .preparing import Examples, Pass
from .tuned import Tuned


class Update(NamedTuple):
  """One update of a pass.

  Attributes:
    theta: before the update.
    grads: of what is trained of it, of the loss and the penalty.
    aux: what rules gave beside the output.
  """

  theta: Any
  grads: Any
  aux: Any


def early_updates(
  examples: Pass,
  tuned: Tuned,
  theta: Any,
  transform: optax.GradientTransformation,
  *,
  steps: int,
  penalty: Callable[[Any], Any],
  read: Callable[[Update], Any] = lambda update: None,
  takes: Callable[[Examples], Mapping[str, Any]] = lambda batch: {},
) -> Iterator[tuple[Any, Any]]:
  """(theta after an update, what was read of it), one batch of a pass after the other.

  What is trained of a theta, the first one too, is gone after the next update, so that memory holds
  one of them.

  Args:
    examples: the pass.
    tuned: from `Pass.attached`.
    theta: to begin with.
    transform: the optimizer of what is trained.
    steps: how many updates there are to be; the pass goes over its examples again until then, see
      `Preparation.again`.
    penalty: theta -> a number that is added to the loss.
    read: of an update, within the compiled step; nothing if left out.
    takes: of a batch, further arguments that rules of the method take; none if left out.

  Raises:
    ValueError: the pass has another number of batches.
  """

  def step(trained, held, state, backbone, arrays, labels, mask, more):
    def loss(trained):
      theta = tuned.join(trained, held)
      args, kwargs = examples.call_of(arrays)
      out, aux = tuned.apply(theta, backbone, *args, aux=True, **kwargs, **more)
      return examples.loss_of(out, labels, mask) + penalty(theta), aux

    grads, aux = jax.grad(loss, has_aux=True)(trained)
    found = read(Update(tuned.join(trained, held), grads, aux))
    updates, state = transform.update(grads, state, trained)
    return optax.apply_updates(trained, updates), state, found

  compiled = jax.jit(step, donate_argnums=(0, 2))
  trained, held = tuned.split(theta)
  state = jax.jit(transform.init)(trained)
  made = 0
  for batch in examples:
    arrays = examples.arrays_of(batch)
    trained, state, found = compiled(
      trained, held, state, examples.backbone, arrays, batch.labels, batch.mask, takes(batch)
    )
    made += 1
    yield tuned.join(trained, held), found
  if made != steps:
    raise ValueError(
      f'{tuned.method.names[0]}: its pass before training had {made} batches for {steps} updates'
    )


def falling_adam(rate: float, steps: int, factors: Callable[[tuple[str, ...]], float]):
  """Adam whose rate falls linearly to 0 over `steps`, times a factor for each entry of theta.

  Args:
    rate: of the first update.
    steps: after how many it is 0.
    factors: keys of the path of an entry -> the factor.
  """

  def scaled(updates):
    def one(path, x):
      return x * factors(entry_path(path))

    return jax.tree_util.tree_map_with_path(one, updates)

  per_entry = optax.stateless(lambda updates, _: scaled(updates))
  schedule = optax.linear_schedule(-rate, 0.0, steps)
  return optax.chain(optax.scale_by_adam(), per_entry, optax.scale_by_schedule(schedule))


def weights_of(batch: Examples) -> jax.Array:
  """How much each token of a batch counts [B, N], or each example [B] where none is padded.

  A token counts unless the model is called with `mask` [B, N] that is 0 there; an example unless it
  only fills up.
  """
  arrays = [x for x in jax.tree.leaves((batch.args, dict(batch.kwargs))) if hasattr(x, 'shape')]
  rows = jnp.ones(arrays[0].shape[0]) if batch.mask is None else jnp.asarray(batch.mask) * 1.0
  mask = batch.kwargs.get('mask')
  if mask is None or jnp.ndim(mask) != 2:
    return rows
  return rows[:, None] * (jnp.asarray(mask) > 0)
