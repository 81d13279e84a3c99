"""The sensitivity of numbers of a backbone on a task, and what a budget of numbers is spent on.

The first stage of SPT (arXiv 2303.08566). For batches t with mean gradients g_t,

  s_n = sum_t g_tn^2

The sum of squared means is neither the squared sum nor the Fisher information of single examples.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import Box, Examples, Method, Pass, Site, Weight, at, backend_of

# Numbers whose gradients exist at a time; more are taken in turn, in a further pass each.
GROUP = 2**27
_HEAD_STD = 0.02


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
  """An array of one layer that may be tuned.

  Attributes:
    site: that owns it, or a part of one.
    array: its name there.
    layer: its position among the layers of a stack in which the method acts.
    is_matrix: whether it is a kernel; else a vector.
  """

  site: Site
  array: str
  layer: int
  is_matrix: bool

  @property
  def shape(self) -> tuple[int, ...]:
    """(fan_in, fan_out), or (length,)."""
    leaf = self.site.leaves[self.array]
    if self.is_matrix:
      return leaf.fan_in, leaf.fan_out
    return (math.prod(leaf.shape),)


@dataclasses.dataclass(frozen=True)
class Sensitive:
  """The most sensitive numbers of several tensors, the first the most sensitive.

  Attributes:
    tensor: which tensor each is in.
    place: its number in the tensor, row by row.
    score: s.
  """

  tensor: np.ndarray
  place: np.ndarray
  score: np.ndarray

  @classmethod
  def of(cls, scores: Iterable[np.ndarray], most: int, first: int = 0) -> 'Sensitive':
    """Those of the scores of tensors from number `first` on, `most` at most, none of them 0."""
    parts = []
    for number, x in enumerate(scores, first):
      flat = x.reshape(-1)
      places = np.flatnonzero(flat)
      parts.append((np.full(len(places), number), places, flat[places]))
    tensor, place, score = (np.concatenate(part) for part in zip(*parts, strict=True))
    return cls(tensor, place, score).first(most)

  def first(self, most: int) -> 'Sensitive':
    """The most sensitive, of equal ones those of earlier tensors."""
    order = np.argsort(-self.score, kind='stable')[:most]
    return Sensitive(self.tensor[order], self.place[order], self.score[order])

  def joined(self, other: 'Sensitive', most: int) -> 'Sensitive':
    """The most sensitive of both."""
    pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self))
    return Sensitive(*(np.concatenate(pair) for pair in pairs)).first(most)


def sensitive(
  examples: Pass, tensors: Sequence[Tensor], most: int, group: int = GROUP
) -> Sensitive:
  """The `most` numbers of some tensors that are the most sensitive.

  Args:
    examples: batches, which are held on the host for further passes.
    tensors: those of a site one after the other.
    most: how many.
    group: numbers whose gradients exist at a time.
  """
  batches = list(examples)
  backbone = fresh_head(examples)
  found = None
  first = 0
  for some in groups(tensors, group):
    _, totals = summed(examples, backbone, batches, some, accumulated)
    scores = (of_tensor(totals, tensor) for tensor in some)
    new = Sensitive.of(scores, most, first)
    found = new if found is None else found.joined(new, most)
    first += len(some)
  if found is None or not len(found.score):
    raise ValueError('the loss of the pass before training does not depend on any of its arrays')
  return found


def groups(tensors: Sequence[Tensor], most: int = GROUP) -> Iterator[list[Tensor]]:
  """Tensors of as many numbers as are taken at once; those of one module stay together."""
  some: list[Tensor] = []
  size = 0
  for tensor in tensors:
    new_module = not some or tensor.site.owner != some[-1].site.owner
    if some and new_module and size > most:
      yield some
      some, size = [], 0
    some.append(tensor)
    size += math.prod(tensor.shape)
  if some:
    yield some


Totals = Mapping[str, Mapping[str, np.ndarray]]


def summed(
  examples: Pass,
  backbone: Any,
  batches: Iterable[Examples],
  tensors: Sequence[Tensor],
  add: Callable[[Any, Any], Any],
) -> tuple[Totals, Totals]:
  """(arrays, sums over batches) for the modules of some tensors, {path: {array: [*stack, ...]}}.

  Args:
    examples: the pass.
    backbone: that the loss is of.
    batches: to go over.
    tensors: of which arrays.
    add: (sums, mean gradient of a batch) -> sums; both are trees like the arrays.
  """
  arrays: dict[str, list[str]] = {}
  for tensor in tensors:
    arrays.setdefault(tensor.site.owner, []).append(tensor.array)
  tuned = examples.attached(_whole(arrays, examples))
  theta = jax.jit(tuned.init)(examples.key, backbone)

  def with_batch(total, theta, backbone, arrays, labels, mask):
    def loss(theta):
      return examples.loss(tuned, theta, backbone, arrays, labels, mask)

    return add(total, jax.grad(loss)(theta))

  step = jax.jit(with_batch, donate_argnums=0)
  total = jax.tree.map(jnp.zeros_like, theta)
  for batch in batches:
    total = step(total, theta, backbone, examples.arrays_of(batch), batch.labels, batch.mask)
  return examples.fetch(theta)['sensitivity'], examples.fetch(total)['sensitivity']


def accumulated(total: Any, gradient: Any) -> Any:
  """The sums of squares with those of one more batch."""
  return jax.tree.map(lambda s, g: s + jnp.square(g), total, gradient)


def _whole(arrays: Mapping[str, Sequence[str]], examples: Pass) -> Method:
  """A method whose theta stands for whole arrays of modules, in the layers of a pass."""

  def init(key, site, values):
    wanted = arrays.get(site.path, ())
    return {name: values[name].astype(jnp.float32) for name in wanted}

  def apply(t, site, values):
    return {name: x.astype(values[name].dtype) for name, x in t.items()}

  return at('.*', Weight('sensitivity', init, apply), layers=examples.layers)


def of_tensor(totals: Totals, tensor: Tensor) -> np.ndarray:
  """What sums have of one tensor, [fan_in, fan_out] or [length]."""
  site = tensor.site
  x = totals[site.owner][tensor.array]
  x = x.reshape(math.prod(site.theta_lengths), *x.shape[len(site.theta_lengths) :])[tensor.layer]
  if tensor.array in site.slices:
    axis, index = site.slices[tensor.array]
    x = x[(*(slice(None),) * axis, index)]
  if tensor.is_matrix:
    return np.asarray(site.leaves[tensor.array].fold(x))
  return x.reshape(-1)


def with_head(examples: Pass) -> Any:
  """The backbone; with a head as new where that is all zeros, which no gradient passes."""
  backend = backend_of(examples.model)
  arrays = backend.arrays(examples.model, examples.backbone)
  kernels = [
    arrays[f'{site.owner}/{name}' if site.owner else name]
    for site in examples.sites.of_role('head')
    for name, leaf in site.leaves.items()
    if leaf.is_matrix
  ]
  if any(isinstance(x, Box) or bool(jnp.any(x != 0)) for x in kernels):
    return examples.backbone
  return fresh_head(examples)


def fresh_head(examples: Pass) -> Any:
  """The backbone with a head as new: kernels of deviation .02, biases 0.

  A head that is the table of words too stays as it is.
  """
  sites = examples.sites
  heads = sites.of_role('head')
  if not heads:
    return examples.backbone
  tables = {site.owner for site in sites.find('{embed}')}
  backend = backend_of(examples.model)
  arrays = backend.arrays(examples.model, examples.backbone)
  changed = {}
  for site in heads:
    for name, leaf in site.leaves.items():
      path = f'{site.owner}/{name}' if site.owner else name
      if site.owner in tables or isinstance(arrays[path], Box):
        continue
      x = arrays[path]
      if leaf.is_matrix:
        drawn = jax.random.truncated_normal(examples.key, -2, 2, x.shape)
        changed[path] = (_HEAD_STD * drawn).astype(x.dtype)
      else:
        changed[path] = jnp.zeros_like(x)
  return backend.replace(examples.model, examples.backbone, {**arrays, **changed})
