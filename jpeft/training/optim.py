"""Optimizers for theta: schedules, learning rates by layer or pattern, decay of matrices only.

Everything here sees theta alone: a global norm or a weight decay over a joint tree would bring the
backbone's gradient back to life. Layer-wise decay follows Clark et al., 2020 (ELECTRA, arXiv
2003.10555) and Bao et al., 2022 (BEiT, arXiv 2106.08254); LoRA+ is Hayou et al., 2024 (arXiv
2402.12354).
"""

import difflib
import math
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jpeft.core import Site, Tuned, freeze

_BLOCK_NUMBER = re.compile(r'(?:block|layer)s?[_/](\d+)(?:/|$)')


def schedule(
  name: str,
  lr: float,
  steps: int,
  warmup_steps: int = 0,
  warmup_fraction: float = 0.0,
  final: float = 0.0,
) -> optax.Schedule:
  """A learning rate that climbs for the warm-up and then follows `name`.

  Args:
    name: 'cosine' or 'linear' (down to final * lr at the last update), or 'constant'.
    lr: at its highest.
    steps: updates in all.
    warmup_steps: updates of linear climb from lr / (warmup_steps + 1).
    warmup_fraction: the same as a share of `steps`; give one of both.
    final: share of lr at the end.

  Raises:
    ValueError: an unknown name, or a warm-up longer than the run.
  """
  warmup = warmup_steps or round(warmup_fraction * steps)
  if warmup > steps:
    raise ValueError(f'a warm-up of {warmup} updates is longer than the run of {steps}')
  rest = max(steps - warmup, 1)
  after = {
    'cosine': lambda: optax.cosine_decay_schedule(lr, rest, alpha=final),
    'linear': lambda: optax.linear_schedule(lr, final * lr, rest),
    'constant': lambda: optax.constant_schedule(lr),
  }
  if name not in after:
    raise ValueError(f'no schedule is called {name!r}, there are {", ".join(after)}')
  if not warmup:
    return after[name]()
  climb = optax.linear_schedule(lr / (warmup + 1), lr, warmup)
  return optax.join_schedules([climb, after[name]()], [warmup])


def lora_fa(scale: float = 1.0, eps: float = 1e-8) -> optax.GradientTransformation:
  """Turns the gradient of each LoRA factor b into that of the product a b, as far as b can follow
  it.

  g <- (a^T a + eps)^-1 g / scale^2, to be chained before Adam: LoRA-FA (arXiv 2308.03303), as
  Hugging Face peft implements it, with learning rate 1e-3 and Adam's eps 1e-6.

  Args:
    scale: alpha / r, or alpha / sqrt(r) for rsLoRA.
    eps: on the diagonal.
  """

  def follow(g, theta):
    if not isinstance(g, dict):
      return g
    if not {'a', 'b'} <= g.keys():
      return {name: follow(x, theta[name]) for name, x in g.items()}
    a = theta['a'].astype(jnp.float32)
    gram = jnp.swapaxes(a, -1, -2) @ a + eps * jnp.eye(a.shape[-1])
    return {
      **g,
      'b': (jnp.linalg.solve(gram, g['b'].astype(jnp.float32)) / scale**2).astype(g['b'].dtype),
    }

  def update(updates, state, params=None):
    if params is None:
      raise ValueError('lora_fa reads a off the parameters: call update(grads, state, params)')
    return follow(updates, params), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _name(path) -> str:
  """A leaf of theta as one word: 'lora/encoder/block_0/attention/query/kernel/a'."""
  return '/'.join(
    str(getattr(k, 'key', getattr(k, 'idx', k))) for k in path if getattr(k, 'key', k) != ''
  )


def _site(tuned: Tuned, path) -> Site:
  """The site that a leaf of theta belongs to: theta is {method name: {site path: ...}}."""
  return tuned.sites[path[1].key]


def factors(
  tuned: Tuned,
  theta,
  groups: Sequence[tuple[str, float]] = (),
  layer_decay: float = 1.0,
  lora_plus: float | None = None,
) -> dict[str, float | np.ndarray]:
  """What the learning rate of each leaf is multiplied by.

  Args:
    tuned: says which leaves are stacked over layers.
    theta: shapes will do.
    groups: ((regex for whole theta paths, factor), ...); factors of all that match are multiplied.
    layer_decay: factor for each block between a leaf and the output; what belongs to no block
      counts as after the last, embeddings as before the first.
    lora_plus: factor of the leaves called 'b'.

  Returns:
    {path: factor}; of a stacked leaf an array that leads with the stack.

  Raises:
    ValueError: a pattern that matches no leaf.
  """
  flat = {
    _name(path): (leaf, _site(tuned, path))
    for path, leaf in jax.tree_util.tree_flatten_with_path(theta)[0]
  }
  out = dict.fromkeys(flat, 1.0)
  for pattern, factor in [*groups, *([(r'.*/b', lora_plus)] if lora_plus is not None else [])]:
    hits = [name for name in flat if re.fullmatch(pattern, name)]
    if not hits:
      near = difflib.get_close_matches(pattern, flat, 3, 0)
      raise ValueError(
        f'the learning rate group {pattern!r} matches no leaf of theta; '
        f'near it are {", ".join(near)}'
      )
    out |= {name: out[name] * factor for name in hits}
  if layer_decay != 1.0:
    depths = {name: _depth(name, *leaf_and_site) for name, leaf_and_site in flat.items()}
    # Blocks count from 0; the output lies one after the last.
    top = 1 + max((int(np.max(d)) for d in depths.values() if d is not None), default=-1)
    for name, depth in depths.items():
      out[name] = out[name] * layer_decay ** (top - (top if depth is None else depth))
  return out


def _depth(name: str, leaf, site: Site) -> int | np.ndarray | None:
  """The number of a leaf's block, -1 for embeddings, None for what comes after the blocks."""
  found = _BLOCK_NUMBER.search(name)
  if found:
    return int(found[1])
  if site.lengths:
    rest = leaf.ndim - len(site.lengths)
    return np.arange(site.layers, dtype=np.float32).reshape(*site.lengths, *[1] * rest)
  return -1 if re.match(r'[^/]*/embed', name) else None


def scale_by_factors(factors: dict) -> optax.GradientTransformation:
  """Multiplies each update by the factor of its path."""

  def update(updates, state, params=None):
    return jax.tree_util.tree_map_with_path(lambda p, u: u * factors[_name(p)], updates), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def matrices(tuned: Tuned):
  """params -> bools: True for what is a matrix or more in one layer: the leaves to decay."""

  def leaf(path, x):
    return x.ndim - len(_site(tuned, path).lengths) > 1

  return lambda params: jax.tree_util.tree_map_with_path(leaf, params)


def rule(
  name: str, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
  """The update direction of an optimizer by name, before weight decay and learning rate.

  Raises:
    ValueError: an unknown name.
  """
  known = {
    'adamw': lambda: optax.scale_by_adam(b1, b2, eps),
    'adam': lambda: optax.scale_by_adam(b1, b2, eps),
    'sgd': lambda: optax.trace(b1) if b1 else optax.identity(),
    'lion': lambda: optax.scale_by_lion(b1, b2),
    'adafactor': lambda: optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),
  }
  if name not in known:
    near = difflib.get_close_matches(name, known, 1)
    raise ValueError(
      f'no optimizer is called {name!r}, there are {", ".join(known)}'
      + (f'; did you mean {near[0]!r}?' if near else '')
    )
  return known[name]()


def optimizer(
  tuned: Tuned,
  theta,
  rate: optax.Schedule,
  *,
  name: str = 'adamw',
  weight_decay: float = 0.0,
  decay_vectors: bool = False,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  clip_norm: float | None = None,
  layer_decay: float = 1.0,
  groups: Sequence[tuple[str, float]] = (),
  lora_plus: float | None = None,
) -> optax.GradientTransformation:
  """The optimizer of theta: clip, direction, decay, factors, rate; entries that a method holds
  fixed stay.

  Weight decay is decoupled for every rule but 'adam' and 'sgd', where it is part of the gradient.

  Args:
    tuned: from `attach`.
    theta: from `tuned.init`; shapes will do.
    rate: the learning rate by update.
    name, b1, b2, eps: see `rule`.
    weight_decay: of matrices alone, unless `decay_vectors`.
    decay_vectors: decay 1-d arrays as well.
    clip_norm: largest global norm of the gradient of theta.
    layer_decay, groups, lora_plus: see `factors`.

  Raises:
    ValueError: an unknown name, a pattern that matches nothing.
  """
  decay = optax.add_decayed_weights(weight_decay, None if decay_vectors else matrices(tuned))
  coupled = name in ('adam', 'sgd')
  scales = factors(tuned, theta, groups, layer_decay, lora_plus)
  plain = all(isinstance(f, float) and math.isclose(f, 1.0) for f in scales.values())
  parts = [
    optax.clip_by_global_norm(clip_norm) if clip_norm else None,
    decay if weight_decay and coupled else None,
    rule(name, b1, b2, eps),
    decay if weight_decay and not coupled else None,
    None if plain else scale_by_factors(scales),
    optax.scale_by_learning_rate(rate),
  ]
  tx = optax.chain(*[part for part in parts if part is not None])
  trainable = tuned.trainable(theta)
  return tx if all(jax.tree.leaves(trainable)) else freeze(tx, trainable)
