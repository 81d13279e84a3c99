"""Runs on a backbone that is loaded whole and then changed: cut, stored in 4 bits, or both."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jpeft import models, quant, tasks
from jpeft.core import Method, Tuned, attach, before_storage, count, to_store, whole_of

from .checkpoints import fingerprint
from .memory import Memory


def as_trained(
  config, pretrained: models.Pretrained, method: Method
) -> tuple[models.Pretrained, Method, models.Pruned | None]:
  """(backbone, method, what was cut) as a run trains them, of whole kernels.

  Nothing is cut, and that is None, where the method leaves no part out or waits for its pass.

  Raises:
    ValueError: the backbone cannot be cut, see `models.narrowed`.
  """
  args, kwargs = inputs_of(config, pretrained)
  small = None
  if models.prunes(method):
    try:
      small = models.pruned(method, pretrained.model, pretrained.variables, *args, **kwargs)
    except TypeError as error:  # not a model whose sizes jpeft knows
      raise ValueError(f'{method.names[0]}: {error}') from error
    pretrained = dataclasses.replace(pretrained, model=small.model, variables=small.backbone)
    method = small.method
  memory = Memory.of(config)
  if memory.storage is None or not before_storage(method):
    return pretrained, method, small

  def coded(variables):
    return quant.quantize(
      pretrained.model,
      quant.named(memory.storage),
      variables,
      *args,
      implementation=memory.implementation,
      **kwargs,
    )

  leaves = jax.tree.leaves(pretrained.variables)
  if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
    variables = jax.eval_shape(coded, pretrained.variables)
  else:
    variables = to_store(method, pretrained.model, pretrained.variables, *args, **kwargs)
    variables = coded(variables)
  return dataclasses.replace(pretrained, variables=variables), method, small


def inputs_of(config, pretrained: models.Pretrained) -> tuple[tuple, dict]:
  """The arguments of a call of the backbone, in evaluation."""
  args, kwargs = tasks.inputs(tasks.of(config).example(config, pretrained))
  return args, {**kwargs, 'deterministic': True}


@dataclasses.dataclass(frozen=True)
class Whole:
  """The model that a run's backbone was cut from, and that its theta is for.

  Attributes:
    model: the module.
    keep: what the run's backbone keeps of it.
    shapes: of theta.
    sha256: of its weights as they were loaded.
    numbers: how many there are.
  """

  model: Any
  keep: models.Keep
  shapes: Any
  sha256: str
  numbers: int

  @functools.cached_property
  def widened(self) -> Callable[[Any], Any]:
    """theta of the run -> the same with zeros in the places that were cut."""

    @jax.jit
    def widened(theta):
      zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.shapes)
      return models.widened_theta(self.model, self.keep, theta, zeros)

    return widened

  def told(self, small: int) -> str:
    """What the results of a run are of, for one with so many numbers in its backbone."""
    return (
      f'trained and evaluated on a backbone cut to {small:,} of {self.numbers:,} numbers; theta is '
      'for the whole one'
    )


def whole_of_run(
  config, pretrained: models.Pretrained, small: models.Pruned | None, tuned: Tuned
) -> Whole | None:
  """The whole model of a run that goes back to it; None for other runs.

  Args:
    config: of the run.
    pretrained: the whole backbone.
    small: the narrow one.
    tuned: the method on the narrow one.

  Raises:
    ValueError: theta of the run would not fit the whole model.
  """
  if small is None or not models.recovers(small.method):
    return None
  if config.method.start is not None:
    raise ValueError(
      f'config.method.start: {config.method.name} trains on a narrow model, and theta files are '
      'for the whole one: leave it out'
    )
  args, kwargs = inputs_of(config, pretrained)
  method = whole_of(small.method)
  wide = attach(pretrained.model, method, pretrained.variables, *args, **kwargs)
  whole = Whole(
    pretrained.model,
    small.keep,
    wide.shapes,
    fingerprint(pretrained.variables),
    count(pretrained.variables),
  )
  own = {name: entries for name, entries in tuned.shapes.items() if name in wide.shapes}
  jax.eval_shape(whole.widened, own)  # rather than after the last update
  return whole
