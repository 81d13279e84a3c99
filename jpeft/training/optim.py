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

from jpeft.core import Site, Tuned, freeze, leaf_paths
from jpeft.messages import did_you_mean

from .adam_8bit import scale_by_adam_8bit as scale_by_adam_8bit
from .by_vector import by_vector as by_vector
from .by_vector import restarts
from .galore import scale_by_galore as scale_by_galore
from .matrix_view import axes_of
from .matrix_view import fold as fold
from .matrix_view import name_of as _name
from .matrix_view import on_matrices as on_matrices
from .matrix_view import unfold as unfold

_OF_MATRICES = ('galore', 'natural_galore', 'muon')
# Those whose state has no part for each vector of a matrix.
_MIXED = (*_OF_MATRICES, 'adamw_8bit')

# The number of a block in the path of a leaf.
_BLOCK_NUMBER = re.compile(r'(?:block|layer)s?[_/](\d+)(?:/|$)')


def schedule(
  name: str,
  lr: float,
  steps: int,
  warmup_steps: int = 0,
  warmup_fraction: float = 0.0,
  final: float = 0.0,
) -> optax.Schedule:
  """A learning rate that rises during the warm-up and then follows `name`.

  Args:
    name: 'cosine' or 'linear' (down to final * lr at the last update), or 'constant'.
    lr: at its highest.
    steps: updates in all.
    warmup_steps: updates of linear rise from lr / (warmup_steps + 1).
    warmup_fraction: the same as a share of `steps`; give one of both.
    final: share of lr at the end.

  Raises:
    ValueError: an unknown name, or a warm-up longer than the run.
  """
  warmup = warmup_steps or round(warmup_fraction * steps)
  if warmup > steps:
    raise ValueError(f'a warm-up of {warmup} updates is longer than the run of {steps}')
  rest = max(steps - warmup, 1)
  known = {
    'cosine': lambda: optax.cosine_decay_schedule(lr, rest, alpha=final),
    'linear': lambda: optax.linear_schedule(lr, final * lr, rest),
    'constant': lambda: optax.constant_schedule(lr),
  }
  if name not in known:
    raise ValueError(f'no schedule is called {name!r}, there are {", ".join(known)}')
  after = known[name]()
  if not warmup:
    return after
  rise = optax.linear_schedule(lr / (warmup + 1), lr, warmup)
  return optax.join_schedules([rise, after], [warmup])


def lora_fa(scale: float = 1.0, eps: float = 1e-8) -> optax.GradientTransformation:
  """Turns the gradient of each LoRA factor b into that of the product a b, projected on b.

  g <- (a^T a + eps)^-1 g / scale^2, to be chained before Adam: LoRA-FA (arXiv 2308.03303), as
  Hugging Face peft implements it, with learning rate 1e-3 and Adam's eps 1e-6.

  Args:
    scale: alpha / r, or alpha / sqrt(r) for rsLoRA.
    eps: on the diagonal.
  """

  def projected(g, theta):
    if not isinstance(g, dict):
      return g
    if not {'a', 'b'} <= g.keys():
      return {name: projected(x, theta[name]) for name, x in g.items()}
    a = theta['a'].astype(jnp.float32)
    b = g['b'].astype(jnp.float32)
    gram = jnp.swapaxes(a, -1, -2) @ a + eps * jnp.eye(a.shape[-1])
    solved = jnp.linalg.solve(gram, b) / scale**2
    return g | {'b': solved.astype(g['b'].dtype)}

  def update(updates, state, params=None):
    if params is None:
      raise ValueError('lora_fa reads a off the parameters: call update(grads, state, params)')
    return projected(updates, params), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


# ---- Factors of the learning rate.


def _site(tuned: Tuned, path) -> Site:
  """The site that a leaf of theta belongs to: theta is {method name: {site path: ...}}."""
  return tuned.site_of(path[0].key, path[1].key)


def factors(
  tuned: Tuned,
  theta,
  groups: Sequence[tuple[str, float]] = (),
  layer_decay: float = 1.0,
  lora_plus: float | None = None,
) -> dict[str, float | np.ndarray]:
  """What the learning rate of each leaf is multiplied by.

  Args:
    tuned: from `attach`; its sites know which leaves are stacked over layers.
    theta: shapes are enough.
    groups: ((regex for whole theta paths, factor), ...); factors of all that match are multiplied.
    layer_decay: factor for each block between a leaf and the output; what belongs to no block
      counts as after the last, embeddings as before the first.
    lora_plus: factor of the leaves called 'b'.

  Returns:
    {path: factor}; of a stacked leaf an array whose first axes are those of the stack.

  Raises:
    ValueError: a pattern that matches no leaf.
  """
  leaves = {}
  sites = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(theta)[0]:
    leaves[_name(path)] = leaf
    sites[_name(path)] = _site(tuned, path)
  out = dict.fromkeys(leaves, 1.0)

  patterns = list(groups)
  if lora_plus is not None:
    patterns.append((r'.*/b', lora_plus))
  for pattern, factor in patterns:
    hits = [name for name in leaves if re.fullmatch(pattern, name)]
    if not hits:
      near = difflib.get_close_matches(pattern, leaves, 3, 0)
      raise ValueError(
        f'the learning rate group {pattern!r} matches no leaf of theta; '
        f'near it are {", ".join(near)}'
      )
    for name in hits:
      out[name] = out[name] * factor

  if layer_decay != 1.0:
    depths = {name: _depth(name, leaf, sites[name]) for name, leaf in leaves.items()}
    # Blocks count from 0, and the output is one after the last.
    output = 1 + max((int(np.max(d)) for d in depths.values() if d is not None), default=-1)
    for name, depth in depths.items():
      if depth is not None:
        out[name] = out[name] * layer_decay ** (output - depth)
  return out


def _depth(name: str, leaf, site: Site) -> int | np.ndarray | None:
  """The number of a leaf's block, -1 for embeddings, None for what comes after the blocks."""
  found = _BLOCK_NUMBER.search(name)
  if found:
    return int(found[1])
  if site.lengths:
    numbers = site.choose(np.arange(site.layers, dtype=np.float32).reshape(site.lengths))
    return numbers.reshape(*numbers.shape, *[1] * (leaf.ndim - numbers.ndim))
  if re.match(r'[^/]*/embed', name):
    return -1
  return None


def scale_by_factors(factors: dict) -> optax.GradientTransformation:
  """Multiplies each update by the factor of its path."""

  def update(updates, state, params=None):
    scaled = jax.tree_util.tree_map_with_path(lambda path, u: u * factors[_name(path)], updates)
    return scaled, state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


# ---- The update rule.


def decays(tuned: Tuned):
  """params -> bools: True for the leaves to decay, which are a matrix or more in one layer."""

  def leaf(path, x):
    return axes_of(tuned, path, x) > 1

  return lambda params: jax.tree_util.tree_map_with_path(leaf, params)


def rule(
  tuned: Tuned,
  name: str,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  rank: int = 128,
  every: int = 200,
  scale: float = 0.25,
  history: int = 20,
  matrices: str = '.*',
  basis: str = 'svd',
) -> optax.GradientTransformation:
  """The update direction of an optimizer by name, before weight decay and learning rate.

  'galore', 'natural_galore' (see `scale_by_galore`) and 'muon' (that of Optax) act on the matrices
  of theta, see `on_matrices`, and Adam on everything else.

  Args:
    tuned: from `attach`.
    name: of the rule.
    b1, b2, eps: of Adam and its kin; 'sgd' reads b1 alone.
    rank, every, scale, basis: of GaLore.
    history: of Natural GaLore.
    matrices: regex for the paths of theta that a rule of matrices acts on.

  Raises:
    ValueError: an unknown name, or a pattern that matches no matrix.
  """
  adam = optax.scale_by_adam(b1, b2, eps)

  def leading(path, x):
    return x.ndim - axes_of(tuned, path, x)

  def of_matrices(tx):
    return on_matrices(tuned, tx, adam, matrices)

  def galore(history=None):
    tx = scale_by_galore(rank, every, scale, b1=b1, b2=b2, eps=eps, history=history, basis=basis)
    return of_matrices(tx)

  known = {
    'adamw': lambda: adam,
    'adamw_8bit': lambda: scale_by_adam_8bit(b1, b2, eps, leading),
    'adam': lambda: adam,
    'sgd': lambda: optax.trace(b1) if b1 else optax.identity(),
    'lion': lambda: optax.scale_by_lion(b1, b2),
    'adafactor': lambda: optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),
    'galore': galore,
    'natural_galore': lambda: galore(history),
    'muon': lambda: of_matrices(optax.contrib.scale_by_muon()),
  }
  if name not in known:
    raise ValueError(
      f'no optimizer is called {name!r}, there are {", ".join(known)}{did_you_mean(name, known)}'
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
  rank: int = 128,
  every: int = 200,
  scale: float = 0.25,
  history: int = 20,
  matrices: str = '.*',
  basis: str = 'svd',
) -> optax.GradientTransformation:
  """The optimizer of theta: clip, direction, decay, factors, rate.

  Entries that a method fixes are left as they are.

  Weight decay is decoupled for every rule but 'adam' and 'sgd', where it is part of the gradient.

  Args:
    tuned: from `attach`.
    theta: from `tuned.init`; shapes are enough.
    rate: the learning rate by update.
    name, b1, b2, eps: see `rule`.
    weight_decay: of matrices alone, unless `decay_vectors`.
    decay_vectors: decay 1-d arrays as well.
    clip_norm: largest global norm of the gradient of theta.
    layer_decay, groups, lora_plus: see `factors`.
    rank, every, scale, history, matrices, basis: of rules of matrices, see `rule`.

  Raises:
    ValueError: an unknown name, a pattern that matches nothing.
  """
  decayed = None if decay_vectors else decays(tuned)
  decay = optax.add_decayed_weights(weight_decay, decayed)
  coupled = name in ('adam', 'sgd')
  scales = factors(tuned, theta, groups, layer_decay, lora_plus)

  parts = []
  if clip_norm:
    parts.append(optax.clip_by_global_norm(clip_norm))
  if weight_decay and coupled:
    parts.append(decay)
  hyperparameters = dict(
    b1=b1,
    b2=b2,
    eps=eps,
    rank=rank,
    every=every,
    scale=scale,
    history=history,
    matrices=matrices,
    basis=basis,
  )
  direction = rule(tuned, name, **hyperparameters)
  restarted = restarts(tuned)
  if restarted and name in _MIXED:
    raise ValueError(
      f'{restarted} clears the moments of single vectors, and {name!r} keeps those of many in one: '
      "take 'adamw', 'lion' or 'sgd'"
    )
  if restarted:
    direction = by_vector(tuned, direction)
  parts.append(direction)
  if weight_decay and not coupled:
    parts.append(decay)
  if not all(isinstance(f, float) and math.isclose(f, 1.0) for f in scales.values()):
    parts.append(scale_by_factors(scales))
  parts.append(optax.scale_by_learning_rate(rate))
  tx = optax.chain(*parts)

  # With stages the state has the same places in all of them, so that moments can be carried on.
  is_staged = any(rule.stages for rule, _ in tuned.rules)
  if all(jax.tree.leaves(tuned.trainable(theta))) and not is_staged:
    return tx
  # By a function of the tree: it serves all of theta, and what `tuned.split` gives of it.
  return freeze(tx, tuned.trainable)


def carried(before, tx: optax.GradientTransformation, trained):
  """The state of an optimizer where other entries are trained from now on.

  What the state before had for an entry, or counted, goes on; what it had for entries that are not
  trained any more is dropped, and new ones start as `tx` starts them.

  Args:
    before: the state of the optimizer so far.
    tx: the optimizer from now on.
    trained: what is trained of theta from now on, from `Tuned.split`.
  """
  known = leaf_paths(before)

  def leaf(path, x):
    old = known.get(jax.tree_util.keystr(path, simple=True, separator='/'))
    if old is None or jnp.shape(old) != jnp.shape(x):
      return x
    return old

  return jax.tree_util.tree_map_with_path(leaf, tx.init(trained))
