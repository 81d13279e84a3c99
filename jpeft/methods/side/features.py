"""A linear head over features from many places, and the selection of the features that it needs.

A head over concatenated features is a sum of products: each place adds its own, phi_i W_i, where
the features are made, so that no list of features is carried to the head and stacked layers stay
stacked. theta holds beside each W_i [F_i, C] a fixed mask `keep` [F_i], ones at first.

Selection has two stages: train with `lasso`, which adds `group_lasso` to what training minimises,
then `select` the features whose weights are largest and train a fresh head on those.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import NO_BACKPROP, Bound, Call, Method, Site, at

from .stack import called

FIXED = ('keep',)


def head_of(site: Site, head: str, name: str) -> Site:
  """The module whose output the new head makes.

  Args:
    site: any module of the model.
    head: pattern of the head.
    name: the method's, for errors.

  Raises:
    ValueError: there is not one such module, or it does not give one row an example.
  """
  heads = called(site, head)
  if len(heads) != 1:
    paths = ', '.join(found.path for found in heads) or 'none'
    raise ValueError(
      f'{name}: {head!r} names {len(heads)} modules that are called, and one makes the prediction: '
      f'{paths}'
    )
  (found,) = heads
  if len(found.out.shape) != 2 or len(found.input.shape) != 2:
    raise ValueError(
      f'{name}: features of an example give one prediction [B, C], and {found.path!r} maps '
      f'{found.input.shape} to {found.out.shape}'
    )
  return found


def begin(key: jax.Array, features: int, classes: int, std: float) -> dict[str, jax.Array]:
  """The parameters of F features: {'kernel': [F, C], normal with that std, 'keep': ones [F]}."""
  return {'kernel': std * jax.random.normal(key, (features, classes)), 'keep': jnp.ones(features)}


def vote(t, x: jax.Array) -> jax.Array:
  """What features x [B, F] add to the logits [B, C]."""
  return (x * t['keep']) @ t['kernel']


def unit(x: jax.Array) -> jax.Array:
  """Rows of length one; rows of zeros stay."""
  square = jnp.sum(jnp.square(x.astype(jnp.float32)), -1, keepdims=True)
  return (x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))).astype(x.dtype)


def head_method(
  name: str,
  head: str,
  std: Callable[[int], float],
  bias: float = 0.0,
  norm: bool = True,
  lasso: float = 0.0,
) -> Method:
  """A new head over its own input and all that was recorded as `vote`.

  Args:
    name: the method's.
    head: pattern of the module whose output it makes.
    std: number of classes -> std of the initial weights.
    bias: initial bias.
    norm: whether features are brought to length one.
    lasso: factor of the sum of all that `penalise` gave, in what training minimises.
  """
  rule = _Head(name, head, std, bias, norm, lasso)
  loss = None
  if lasso:
    loss = rule.loss
  call = Call(
    name, rule.apply, rule.init, fixed=FIXED, taps=True, loss=loss, memory=NO_BACKPROP, head=True
  )
  return at(head, call)


def penalise(call: Bound, name: str, t: Mapping[str, Any], lasso: float) -> None:
  """Gives the penalty of the features at one place, beside the output; nothing if lasso is 0.

  Args:
    call: of the place.
    name: the method's.
    t: its parameters, with a 'kernel' [F, C].
    lasso: factor of the penalty.
  """
  if lasso:
    call.aux(**{_penalty(name): group_lasso({call.site.path: t})})


def _penalty(name: str) -> str:
  """What the penalties of a method are called beside the output."""
  return f'{name}_lasso'


@dataclasses.dataclass(frozen=True, eq=False)
class _Head:
  name: str
  head: str
  std: Callable[[int], float]
  bias: float
  norm: bool
  lasso: float

  def init(self, key, site, arrays):
    classes = head_of(site, self.head, self.name).out.shape[-1]
    t = begin(key, site.input.shape[-1], classes, self.std(classes))
    t['bias'] = jnp.full(classes, self.bias)
    return t

  def apply(self, t, call, x, *args, **kwargs):
    penalise(call, self.name, t, self.lasso)
    x = jax.lax.stop_gradient(x)
    if self.norm:
      x = unit(x)
    logits = vote(t, x) + t['bias']
    votes = [taps['vote'] for taps in call.taps().values() if 'vote' in taps]
    # A scanned layer's votes come stacked, [layers, B, C].
    logits = logits + sum(v.reshape(-1, *logits.shape).sum(0) for v in votes)
    # Behind norms features may be wider than the model's numbers.
    return logits.astype(call.site.out.dtype)

  def loss(self, task_loss, run):
    """The task's loss, and the penalties of all places."""
    out, aux = run()
    return task_loss(out) + self.lasso * aux[_penalty(self.name)].sum(), out


def group_lasso(t: Mapping[str, Any]) -> jax.Array:
  """The penalty that empties features: the sum over features of the length of their row of weights.

  Args:
    t: theta[name], with a 'kernel' [.., F, C] at each site.
  """
  total = 0
  for site in t.values():
    square = jnp.square(site['kernel'].astype(jnp.float32)).sum(-1)
    # The root has no slope at zero, where a row that the penalty has emptied must stay. The inner
    # `where` keeps its infinite derivative out of the gradient, where 0 * inf is nan.
    length = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    total = total + length.sum()
  return total


def select(t: Mapping[str, Any], fraction: float, fresh: Mapping[str, Any]) -> dict:
  """theta of the second stage: a fresh head over the features with the largest weights.

  Args:
    t: theta[name], trained.
    fraction: of the features of all places together that are kept, rounded down.
    fresh: theta[name] as initialised, whose head it is. Other arrays (queries) are taken from t.

  Raises:
    ValueError: no feature would be kept.
  """
  scores = {}
  for path, site in t.items():
    scores[path] = np.linalg.norm(np.asarray(site['kernel']), axis=-1)
  flat = np.concatenate([score.ravel() for score in scores.values()])
  kept = int(fraction * len(flat) + 1e-9)  # 0.29 * 100 is 28.999...
  if not 0 < kept <= len(flat):
    raise ValueError(f'fraction={fraction} keeps {kept} of {len(flat)} features')
  chosen = np.zeros(len(flat), np.float32)
  chosen[np.argsort(-flat, kind='stable')[:kept]] = 1
  selected = {}
  start = 0
  for path, score in scores.items():
    new = dict(t[path])
    for name in ('kernel', 'bias'):
      if name in new:
        new[name] = fresh[path][name]
    new['keep'] = jnp.asarray(chosen[start : start + score.size].reshape(score.shape))
    start += score.size
    selected[path] = new
  return selected
