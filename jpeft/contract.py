"""The contract that every method keeps on every model, and `check`, which tries it.

Each property is a function of what a method and its model computed. It returns None, or one
sentence about what is wrong. `tests/contract` uses the same functions on all methods of jpeft.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import Method, Tuned, Weight, backend_of, leaf_paths, named_key
from jpeft.messages import columns

# Two ways to compute one function in float32 differ by rounding alone.
ROUNDING = 1e-5
# A gradient this many times smaller than the largest one is none.
NO_GRADIENT = 1e-6


@dataclasses.dataclass(frozen=True)
class Check:
  """What was found of one property.

  Attributes:
    name: of the property.
    passed: None where the property does not apply.
    detail: one sentence.
  """

  name: str
  passed: bool | None
  detail: str


class Checks(tuple[Check, ...]):
  """What `check` found: true if nothing failed; prints as a table."""

  __slots__ = ()

  def __bool__(self) -> bool:
    return all(one.passed is not False for one in self)

  def __str__(self) -> str:
    words = {True: 'yes', False: 'NO', None: '-'}
    rows = [('property', 'holds', 'detail')]
    rows += [(one.name, words[one.passed], one.detail) for one in self]
    return '\n'.join(columns(rows))


def check(
  tuned: Tuned, backbone: Any, /, *args, start: float | None = ROUNDING, **kwargs
) -> Checks:
  """Tries the contract of methods on one model: for a method, or a model, of one's own.

  The forward pass is compiled a few times, and one training step once.

  Args:
    tuned: from `attach`.
    backbone: as given to `attach`.
    *args: an example input, arrays.
    start: how far the output may be from the untouched model's before training, in units of its
      largest entry; None for a method that starts elsewhere.
    **kwargs: keyword arguments of the forward pass, in evaluation.

  Returns:
    One row a property. `assert jpeft.check(...)` fails if one of them does; print it to see which.
  """
  trial = _Trial(tuned, backbone, args, kwargs)
  output = trial.row('output', lambda: output_fault(trial.first, trial.plain))
  if not output.passed:  # the others compare outputs
    return Checks((output,))
  return Checks(
    (
      trial.start_row(start),
      output,
      trial.row('theta', lambda: theta_fault(trial.theta)),
      trial.merge_row(),
      trial.row('gradient', lambda: gradient_fault(trial.gradients['theta'])),
      trial.row('backbone', lambda: backbone_fault(trial.gradients['backbone'])),
      trial.dot_row(),
      trial.row('compiled once', trial.compilation_fault),
    )
  )


def start_fault(out: Any, plain: Any, within: float | None) -> str | None:
  """A method starts as the untouched model, up to `within`; None for one that starts elsewhere."""
  if within is None:
    return None
  found = distance(out, plain)
  if found <= within:
    return None
  return (
    f'before training the output is {found:.1e} away from that of the untouched model, more than '
    f'{within:.0e}; start what is added at zero, or call check(..., start=None)'
  )


def output_fault(out: Any, plain: Any) -> str | None:
  """The output keeps its structure, shapes and dtypes."""
  found = jax.eval_shape(lambda: out)
  wanted = jax.eval_shape(lambda: plain)
  if found == wanted:
    return None
  return f'the output is {found}, and that of the untouched model {wanted}'


def theta_fault(theta: Any) -> str | None:
  """Theta has float32 entries, whatever the dtype of the model."""
  for path, leaf in leaf_paths(theta).items():
    if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype != jnp.float32:
      return f'theta {path!r} is {leaf.dtype}: updates of half precision get lost; make it float32'
  return None


def merge_fault(merged: Any, applied: Any, within: float = ROUNDING) -> str | None:
  """The untouched model computes with merged weights what `apply` computes with theta."""
  found = distance(merged, applied)
  if found < within:
    return None
  return f'the output with merged weights is {found:.1e} away from that of apply'


def gradient_fault(gradients: Any, trained: Any = None) -> str | None:
  """Every trained entry of theta gets a gradient.

  Args:
    gradients: of what is trained of theta, away from its start.
    trained: a tree of bools like it: False for entries that need none; None if all do.
  """
  sizes = largest(gradients)
  scale = max(sizes.values(), default=0.0)
  wanted = dict.fromkeys(sizes, True) if trained is None else leaf_paths(trained)
  still = [path for path, size in sizes.items() if wanted[path] and not size > NO_GRADIENT * scale]
  if not still:
    return None
  return f'no gradient reaches {", ".join(still[:3])}: name it in fixed=, or use it in the output'


def backbone_fault(gradients: Any) -> str | None:
  """The backbone gets no gradient."""
  for path, size in largest(gradients).items():
    if size != 0:
      return f'the backbone gets a gradient at {path}'
  return None


def dot_fault(fused: Any, boxed: Any, within: float = ROUNDING) -> str | None:
  """`dot` of a Weight does to x @ w what its `apply` does to w."""
  found = distance(fused, boxed)
  if found < within:
    return None
  return f'through dot the output is {found:.1e} away from that through the weights'


def distance(got: Any, want: Any) -> float:
  """The largest difference between two trees, in units of the largest entry of `want`.

  Where `want` is zero, as behind a head that starts at zero, the difference itself.
  """
  pairs = []
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    pairs.append((np.asarray(g, np.float32), np.asarray(w, np.float32)))
  difference = max(np.abs(g - w).max() for g, w in pairs)
  scale = max(np.abs(w).max() for _, w in pairs)
  if scale == 0:
    return float(difference)
  return float(difference / scale)


def largest(tree: Any) -> dict[str, float]:
  """{path: largest magnitude} of every leaf."""
  return {path: float(np.max(np.abs(leaf))) for path, leaf in leaf_paths(tree).items()}


def without_dot(tuned: Tuned) -> Tuned:
  """The same method, whose rules act through the weights alone."""
  slow = {}
  for rule, _ in tuned.rules:
    if isinstance(rule, Weight) and rule.dot is not None:
      slow[id(rule)] = dataclasses.replace(rule, dot=None, requires='nothing', origin=None)
  rules = tuple((slow.get(id(rule), rule), site) for rule, site in tuned.rules)
  method = Method((pattern, slow.get(id(rule), rule)) for pattern, rule in tuned.method)
  return dataclasses.replace(tuned, rules=rules, method=method)


class _Trial:
  """What one method computes on one model, each thing once."""

  def __init__(self, tuned: Tuned, backbone: Any, args: tuple, kwargs: dict):
    self.tuned, self.backbone, self.args, self.kwargs = tuned, backbone, args, kwargs
    self.theta = jax.jit(tuned.init)(jax.random.key(0), backbone)
    self.moved = _moved(self.theta)
    self.traces = 0
    self.step = jax.jit(self._step)
    self.first = self._apply(tuned, self.theta)
    self.plain = self._plain(backbone)
    leaves, self._structure = jax.tree.flatten(backbone)
    self._is_float = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]
    self._leaves = leaves
    floats = [x for x, is_float in zip(leaves, self._is_float, strict=True) if is_float]
    self.out, self.gradients = self.step(self.moved, floats)
    # Once more, on what an update gives: nothing is compiled anew.
    trained, held = tuned.split(self.moved)
    trained = jax.tree.map(
      lambda x, gradient: x - 1e-3 * gradient, trained, self.gradients['theta']
    )
    updated = tuned.join(trained, held)
    self.step(updated, floats)

  def _step(self, theta, floats):
    self.traces += 1
    trained, held = self.tuned.split(theta)

    def loss(trees):
      out = self.tuned.apply(
        self.tuned.join(trees['theta'], held),
        self._with(trees['backbone']),
        *self.args,
        **self.kwargs,
      )
      squares = [jnp.sum(jnp.square(y.astype(jnp.float32))) for y in jax.tree.leaves(out)]
      return sum(squares), out

    trees = {'theta': trained, 'backbone': floats}
    (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(trees)
    return out, gradients

  def _with(self, floats: list) -> Any:
    """The backbone with other float arrays."""
    others = iter(floats)
    leaves = []
    for leaf, is_float in zip(self._leaves, self._is_float, strict=True):
      leaves.append(next(others) if is_float else leaf)
    return jax.tree.unflatten(self._structure, leaves)

  def _apply(self, tuned: Tuned, theta) -> Any:
    def run(theta, backbone):
      return tuned.apply(theta, backbone, *self.args, **self.kwargs)

    return jax.jit(run)(theta, self.backbone)

  def _plain(self, backbone) -> Any:
    """The output of the untouched model with some weights."""
    model = self.tuned.model
    backend = backend_of(model)

    def run(backbone):
      arrays = backend.arrays(model, backbone)
      no_hooks = frozenset()
      out, _ = backend.run(
        model, backbone, arrays, {}, None, no_hooks, False, self.args, dict(self.kwargs)
      )
      return out

    return jax.jit(run)(backbone)

  def row(self, name: str, fault: Callable[[], str | None]) -> Check:
    found = fault()
    return Check(name, found is None, 'as it should be' if found is None else found)

  def start_row(self, within: float | None) -> Check:
    found = f'the output is {distance(self.first, self.plain):.1e} away from the untouched model'
    if within is None:
      return Check('start', None, f'declared elsewhere: {found}')
    fault = start_fault(self.first, self.plain, within)
    return Check('start', fault is None, fault or found)

  def merge_row(self) -> Check:
    if not self.tuned.mergeable:
      rule, site = self.tuned.unmergeable[0]
      where = site.path or 'the model'
      return Check('merge', None, f'{rule.name} at {where} changes the computation: no weights do')
    for rule, _ in self.tuned.rules:
      if isinstance(rule, Weight) and rule.outer:
        names = ', '.join(rule.outer)
        return Check('merge', None, f'merges at given values of {names}, which {rule.name} reads')
    merged = jax.jit(self.tuned.merge)(self.moved, self.backbone)
    return self.row('merge', lambda: merge_fault(self._plain(merged), self.out))

  def dot_row(self) -> Check:
    if not any(isinstance(rule, Weight) and rule.dot for rule, _ in self.tuned.rules):
      return Check('dot', None, 'no rule has a dot')
    boxed = self._apply(without_dot(self.tuned), self.moved)
    return self.row('dot', lambda: dot_fault(self.out, boxed))

  def compilation_fault(self) -> str | None:
    if self.traces == 1:
      return None
    return f'a training step was traced {self.traces} times: theta changes its shapes or dtypes'


def _moved(theta: Any) -> Any:
  """A theta off its start, where nothing is zero by construction."""

  def noisy(path, x):
    if not jnp.issubdtype(x.dtype, jnp.floating):
      return x
    key = named_key(jax.random.key(1), jax.tree_util.keystr(path))
    return x + 0.1 * jax.random.normal(key, x.shape, x.dtype)

  return jax.tree_util.tree_map_with_path(noisy, theta)
