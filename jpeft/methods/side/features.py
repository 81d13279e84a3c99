"""A linear head over features from many places, and the selection of the features that it needs.

A head over concatenated features is a sum of products: each place adds its own, phi_i W_i, where
the features are made, so that no list of features is carried to the head and stacked layers stay
stacked. theta holds beside each W_i [F_i, C] a fixed mask `keep` [F_i], ones at first.

Selection has two stages: train with `group_lasso` in the loss, then `select` the features whose
weights are largest and train a fresh head on those.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import NO_BACKPROP, Call, Method, Site, at

FIXED = ('keep',)


def head_of(site: Site, head: str, name: str) -> Site:
  """The module whose output the new head makes.

  Raises:
    ValueError: there is not one such module, or it does not give one row an example.
  """
  heads = [s for s in site.model.find(head) if s.out is not None]
  if len(heads) != 1:
    raise ValueError(
      f'{name}: {head!r} names {len(heads)} modules that are called, and one makes the prediction: '
      f'{", ".join(s.path for s in heads) or "none"}'
    )
  if len(heads[0].out.shape) != 2 or len(heads[0].input.shape) != 2:
    raise ValueError(
      f'{name}: features of an example give one prediction [B, C], and {heads[0].path!r} maps '
      f'{heads[0].input.shape} to {heads[0].out.shape}'
    )
  return heads[0]


def begin(key, features: int, classes: int, std: float) -> dict:
  """{'kernel': [F, C], 'keep': [F]}."""
  return {'kernel': std * jax.random.normal(key, (features, classes)), 'keep': jnp.ones(features)}


def vote(t, x: jax.Array) -> jax.Array:
  """What features x [B, F] add to the logits [B, C]."""
  return (x * t['keep']) @ t['kernel']


def unit(x: jax.Array) -> jax.Array:
  """Rows of length one; rows of zeros stay."""
  square = jnp.sum(jnp.square(x.astype(jnp.float32)), -1, keepdims=True)
  return (x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))).astype(x.dtype)


def head_method(name: str, head: str, std, bias: float = 0.0, norm: bool = True) -> Method:
  """A new head over its own input and all that was recorded as `vote`.

  Args:
    name: the method's.
    head: pattern of the module whose output it makes.
    std: classes -> of the initial weights.
    bias: at first.
    norm: whether features are normalised.
  """

  def init(key, site, arrays):
    classes = head_of(site, head, name).out.shape[-1]
    return {
      **begin(key, site.input.shape[-1], classes, std(classes)),
      'bias': jnp.full(classes, bias),
    }

  def apply(t, call, x, *args, **kwargs):
    x = jax.lax.stop_gradient(x)
    logits = vote(t, unit(x) if norm else x) + t['bias']
    votes = [v['vote'] for path, v in call.taps().items() if 'vote' in v]
    logits = logits + sum(v.reshape(-1, *logits.shape).sum(0) for v in votes)
    return logits.astype(
      call.site.out.dtype
    )  # features may be wider than the model's numbers, behind norms

  return at(head, Call(name, apply, init, fixed=FIXED, taps=True, memory=NO_BACKPROP, head=True))


def group_lasso(t) -> jax.Array:
  """The sum over features of the length of their row of weights; t is theta[name], [.., F, C] a
  kernel.
  """
  squares = [jnp.square(s['kernel']).sum(-1) for s in t.values()]
  # The root has no slope at zero, where a row that the penalty has emptied must stay.
  return sum(jnp.where(s > 0, jnp.sqrt(jnp.where(s > 0, s, 1)), 0).sum() for s in squares)


def select(t, fraction: float, fresh) -> dict:
  """theta of the second stage: the head of `fresh`, the features that the weights of `t` are
  largest on.

  Args:
    t: theta[name], trained.
    fraction: of the features of all places together that are kept, rounded down.
    fresh: theta[name] as initialised; what is no weight of the head (queries) is taken from t.

  Raises:
    ValueError: no feature would be kept.
  """
  scores = {path: np.linalg.norm(np.asarray(s['kernel']), axis=-1) for path, s in t.items()}
  flat = np.concatenate([s.ravel() for s in scores.values()])
  kept = int(fraction * len(flat) + 1e-9)
  if not 0 < kept <= len(flat):
    raise ValueError(f'fraction={fraction} keeps {kept} of {len(flat)} features')
  chosen = np.zeros(len(flat), np.float32)
  chosen[np.argsort(-flat, kind='stable')[:kept]] = 1
  parts = np.split(chosen, np.cumsum([s.size for s in scores.values()])[:-1])
  keep = {
    path: jnp.asarray(p.reshape(scores[path].shape)) for path, p in zip(scores, parts, strict=True)
  }
  head = ('kernel', 'bias')
  return {
    path: {
      n: keep[path] if n == 'keep' else fresh[path][n] if n in head else x for n, x in s.items()
    }
    for path, s in t.items()
  }
