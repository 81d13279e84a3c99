"""LoftQ: LoRA that starts at what a kernel loses when it is stored in 4 bits.

Li et al., 2024, "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models" (arXiv
2310.08659). For a kernel w [fan_in, fan_out], q what 4 bits make of a matrix, s the scale of LoRA,
and a b = 0 before, `iterations` times

  w_q = q(w - s a b)        s a b = the r largest singular triplets of w - w_q

and then w_q is stored and a, b are what training starts from: w_q + s a b is nearer to w than q(w).
With one iteration w_q = q(w), the kernel that is stored anyway.

Deviation. The factors are divided by s, so that the start is the same for any alpha; the official
code and peft take s as 1 there, and then multiply by alpha / r.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import (
  Box,
  Found,
  Method,
  Pass,
  Preparation,
  Site,
  Weight,
  at,
  backend_of,
  join_path,
  matrix,
  prepared_by,
)
from jpeft.quant import Format, kernels


def from_residuals(
  method: Method, targets: str, rank: int, scale: float, iterations: int
) -> Method:
  """LoRA that waits for a pass (`prepare`), in which it gets its start.

  Args:
    method: LoRA with any start, of one rule.
    targets: pattern of its sites.
    rank, scale: r and s.
    iterations: how often kernels are quantized.
  """
  ((_, rule),) = method
  made = _Loftq(rule, targets, rank, scale, iterations)
  return prepared_by(
    method,
    Preparation(
      'starts at what 4 bits lose',
      made.find,
      made.resolved,
      made.told,
      batches=1,  # of which nothing is used
      stored=made.stored,
    ),
  )


@dataclasses.dataclass(frozen=True, eq=False)
class _Loftq:
  """The start of a rule; the fields are arguments of `from_residuals`."""

  rule: Weight
  targets: str
  rank: int
  scale: float
  iterations: int

  def find(self, examples: Pass) -> dict[str, np.ndarray]:
    """{'a path array', 'b path array': [layers, ...]}; 'before_a' of the last iteration but one.

    Raises:
      ValueError: kernels are not to be stored in 4 bits, or are so already.
    """
    name = self.rule.name
    if examples.storage is None:
      raise ValueError(
        f"{name}: init='loftq' starts at what kernels lose in 4 bits, and none are stored so: ask "
        'for model.quantize=nf4, or prepare(..., storage=jpeft.nf4())'
      )
    arrays = backend_of(examples.model).arrays(examples.model, examples.backbone)
    coded = kernels(examples.sites, '{linear}')
    found = {}
    errors = np.zeros(2)
    for site in examples.find(self.targets):
      for array, leaf in site.leaves.items():
        path = join_path(site.path, array)
        if not leaf.is_matrix and leaf.use != 'gather':  # LoRA is for kernels and tables
          continue
        if path not in coded:
          raise ValueError(
            f"{name}: init='loftq' is for kernels that are stored in 4 bits, those of {{linear}}, "
            f'and {path!r} is none'
          )
        w = arrays[path]
        if isinstance(w, Box):
          raise ValueError(
            f"{name}: init='loftq' reads whole kernels, and {path!r} is stored as "
            f'{type(w).__name__} already: quantize the backbone after the pass'
          )
        own, squares = self.of_kernel(examples, site, array, w)
        errors += squares
        for entry, x in own.items():
          found[f'{entry} {site.path} {array}'] = x
    return {**found, 'errors': np.sqrt(errors)}

  def of_kernel(
    self, examples: Pass, site: Site, array: str, w: jax.Array
  ) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(the factors of a kernel, |w - q(w)|^2 and |w - w_q - s a b|^2 over its layers)."""
    leaf = site.leaves[array]
    layers = site.choose(site.stack_first(w)).reshape(-1, *leaf.shape)
    if self.rank > min(leaf.fan_in, leaf.fan_out):
      raise ValueError(
        f"{self.rule.name}: init='loftq' takes at most rank {min(leaf.fan_in, leaf.fan_out)} out "
        f'of a matrix [{leaf.fan_in}, {leaf.fan_out}], not {self.rank}'
      )

    def of_matrix(w):
      return self.of_matrix(examples.storage, w)

    of_layer: Callable = of_matrix
    for _ in leaf.batch:
      of_layer = jax.vmap(of_layer)
    # One layer after the other, as kernels are quantized.
    compiled = jax.jit(lambda layers: jax.lax.map(lambda x: of_layer(leaf.fold(x)), layers))
    own = dict(examples.fetch(compiled(layers)))
    squares = own.pop('squares').reshape(-1, 2).sum(0)
    return own, squares

  def of_matrix(self, form: Format, w: jax.Array) -> dict[str, jax.Array]:
    """a, b and the squared errors without and with them, of one matrix."""
    w = w.astype(jnp.float32)

    def coded(w):
      return form.decode(form.encode(w), w.shape).astype(jnp.float32)

    a = jnp.zeros((w.shape[0], self.rank))
    b = jnp.zeros((self.rank, w.shape[1]))
    first = jnp.square(w - coded(w)).sum()
    for _ in range(self.iterations):
      before = {'a': a, 'b': b}
      rest = w - coded(w - self.scale * (a @ b))
      a, b = factors_of(rest, self.rank, self.scale)
    last = jnp.square(rest - self.scale * (a @ b)).sum()
    found = {'a': a, 'b': b, 'squares': jnp.stack([first, last])}
    if self.iterations > 1:
      found |= {f'before_{entry}': x for entry, x in before.items()}
    return found

  def told(self, found: Found) -> str:
    first, last = found['errors']
    return f'starts {last / max(first, 1e-30):.0%} as far from the kernels as 4 bits alone are'

  # What follows from it.

  def resolved(self, found: Found) -> Method:
    factors = _by_site(found, 'a', 'b')
    return at(self.targets, dataclasses.replace(self.rule, init=functools.partial(_start, factors)))

  def stored(self, found: Found) -> Method | None:
    """LoRA whose merge is w - s a b, for a b of the last iteration but one."""
    factors = _by_site(found, 'before_a', 'before_b')
    if not factors:
      return None

    def weight(t, w):
      return w - (self.scale * (t['before_a'] @ t['before_b'])).astype(w.dtype)

    rule = matrix(f'{self.rule.name}_before', lambda key, w: {}, weight)
    return at(self.targets, dataclasses.replace(rule, init=functools.partial(_start, factors)))


def factors_of(rest: jax.Array, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
  """(a, b): scale a b is the nearest matrix of a rank to `rest`, half of its size in each."""
  u, s, vt = jnp.linalg.svd(rest, full_matrices=False)
  root = jnp.sqrt(s[:rank] / scale)
  return u[:, :rank] * root, root[:, None] * vt[:rank]


_Factors = Mapping[str, Mapping[str, Mapping[str, np.ndarray]]]


def _by_site(found: Found, *entries: str) -> _Factors:
  """{path: {array: {entry: [layers, ...]}}} of some entries."""
  by_site: dict[str, dict[str, dict[str, Any]]] = {}
  for key, x in found.items():
    entry, *place = key.split(' ')
    if entry in entries:
      path, array = place
      by_site.setdefault(path, {}).setdefault(array, {})[entry] = x
  return by_site


def _start(factors: _Factors, key, site: Site, arrays) -> dict:
  """The factors of one layer of a site."""
  t: dict[str, dict[str, jax.Array]] = {}
  for array, own in factors.get(site.path, {}).items():
    t[array] = {entry: site.one_layer(x, arrays.number) for entry, x in own.items()}
  return t
