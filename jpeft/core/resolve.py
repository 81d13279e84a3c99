"""Where the rules of a method act: which arrays are boxed, which calls are wrapped."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jpeft.messages import did_you_mean

from .blame import blame
from .boxes import Arrays, Reader
from .fused import field_of
from .rules import Call, Rule, Weight
from .sites import Site, Sites


class Plan(NamedTuple):
  """How the rules of a method are carried out.

  Attributes:
    boxed: (rule, site, names): arrays of a site that are computed each time they are read, in the
      order of the rules.
    wrapped: {path: (rule, site), ...}: rules that act around the call of a module, in their order.
    quantized: {path: name}: kernels that are boxes in the backbone, and that the backward pass can
      compute again.
  """

  boxed: list[tuple[Weight, Site, tuple[str, ...]]]
  wrapped: dict[str, list[tuple[Rule, Site]]]
  quantized: dict[str, str]


def plan(rules: Sequence[tuple[Rule, Site]], sites: Sites) -> Plan:
  """Decides for each rule between the call of its site and its arrays.

  A Weight acts through `dot` if every Weight after it that changes the kernel does: so `merge`
  equals `apply` in any order of the chain. What it changes beside the kernel, such as a bias, is
  boxed all the same.
  """
  boxed = []
  wrapped = {}
  boxed_kernels = set()
  for rule, site in reversed(rules):
    names = ()
    acts_in_call = isinstance(rule, Call)
    if isinstance(rule, Weight):
      names = changes(rule, site)
      acts_in_call = _has_dot(rule, site) and site.owner not in boxed_kernels
    if acts_in_call:
      wrapped.setdefault(site.owner, []).insert(0, (rule, site))
      names = tuple(name for name in names if name not in site.matrices)
    elif set(names) & set(site.matrices):
      boxed_kernels.add(site.owner)
    if names:
      boxed.insert(0, (rule, site, names))
  quantized = {}
  for path, site in sites.items():
    if field_of(site) is not None and site.matrices[0] in site.boxes:
      quantized[path] = site.matrices[0]
      wrapped.setdefault(path, [])
  return Plan(boxed, wrapped, quantized)


def entry_at_module(rule: Rule, site: Site) -> str:
  """Tells the theta of a rule at several parts of one module apart."""
  return f'{rule.name}:{site.part}' if site.part else rule.name


@functools.lru_cache(maxsize=65536)
def changes(rule: Weight, site: Site) -> tuple[str, ...]:
  """The names of the arrays that a Weight replaces at a site, from shapes."""

  for entry in rule.outer:
    if entry in site.leaves:
      raise ValueError(
        f'{rule.name} at {site.path!r}: outer={entry!r} is the name of an array of the site'
      )

  def new(key, arrays):
    number = jnp.int32(0) if site.axes else site.number
    with blame(rule, site, 'init'):
      theta = rule.init(key, site, Arrays(arrays, _Zeros(site.model.arrays), number))
    around = {entry: jnp.zeros(()) for entry in rule.outer}
    with blame(rule, site, 'apply'):
      return rule.apply({**theta, **around}, site, Reader(arrays))

  shapes = {}
  for name, leaf in site.leaves.items():
    shapes[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
  made = jax.eval_shape(new, jax.random.key(0), shapes | site.boxes)
  for name, array in made.items():
    if name not in site.leaves:
      raise ValueError(
        f'apply of {rule.name!r} at {site.path!r} returns {name!r}, which is no array of the site; '
        f'its arrays are {", ".join(site.leaves) or "none"}{did_you_mean(name, site.leaves)}'
      )
    if tuple(array.shape) != site.leaves[name].shape:
      raise ValueError(
        f'apply of {rule.name!r} at {site.path!r} returns {name!r} of shape {tuple(array.shape)}, '
        f'and the array is {site.leaves[name].shape}'
      )
  return tuple(made)


def _has_dot(rule: Weight, site: Site) -> bool:
  """Whether a Weight can act on the product of its site instead of the kernel."""
  if rule.dot is None or field_of(site) is None:
    return False
  batched = any(site.leaves[name].batch for name in site.matrices)
  if batched and (rule.outer or not rule.by_matrix):
    return False
  return set(site.matrices) <= set(changes(rule, site))


class _Zeros(Mapping):
  """Arrays of zeros for shapes, made when they are read; under jax.eval_shape nothing is."""

  def __init__(self, shapes: Mapping[str, Any]):
    self._shapes = shapes

  def __getitem__(self, name: str):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self._shapes[name])

  def __iter__(self) -> Iterator[str]:
    return iter(self._shapes)

  def __len__(self) -> int:
    return len(self._shapes)
