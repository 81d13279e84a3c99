"""What a method is: rules, each a pure value, at the sites that a pattern names."""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import jax

from .sites import Leaf

MEMORY_CLASSES = ('no backbone backprop', 'partial re-entry', 'full crossing')


def _nothing(key, site, arrays) -> dict:
  return {}


@dataclasses.dataclass(frozen=True)
class Weight:
  """Reparametrises arrays that a site owns.

  Attributes:
    name: the method's name: theta[name][site path].
    init: (key, site, arrays) -> t, for one layer.
    apply: (t, site, arrays) -> {array name: new array or box}: computed each time the model reads
      it. What `arrays[name]` gives is plain; `arrays.stored(name)` is the box, where the backbone
      holds one.
    dot: (t, x, y, w, key) -> y', what `apply` does to y = x @ w for the site's only kernel, without
      the kernel: no gradient of its size is ever formed. What `apply` changes beside the kernel is
      computed as for a rule without `dot`. `x` multiplies matrices [fan_in, k] by `@`
      (a convolution does so as a convolution); `w` is a function that returns [fan_in, fan_out];
      `key` is None outside training.
    fixed: names of entries of t that are not trained.
    exact: names of entries of t that `dot` gets as stored; the others come in the dtype of y.
    needs_dot: the rule has no meaning without `dot`, and draws random numbers in it (dropout of the
      input).
    needs_input: the rule has no meaning without `dot`.
    update: (t, site, step, key) -> t: a schedule or a periodic edit, after each training step.
    memory: what the backward pass must keep of the backbone, one of MEMORY_CLASSES.
  """

  name: str
  init: Callable[..., Any]
  apply: Callable[..., dict]
  dot: Callable[..., jax.Array] | None = None
  fixed: tuple[str, ...] = ()
  exact: tuple[str, ...] = ()
  needs_dot: bool = False
  needs_input: bool = False
  update: Callable[..., Any] | None = None
  memory: str = MEMORY_CLASSES[-1]


@dataclasses.dataclass(frozen=True)
class Call:
  """Wraps a site's call.

  Attributes:
    name: the method's name: theta[name][site path].
    apply: (t, call, *args, **kwargs) -> out; `call(*args, **kwargs)` runs what is wrapped. See
      `attach.Bound` for what else a call may ask of the model around it.
    init: (key, site, arrays) -> t, for one layer.
    merge: (t, site, arrays) -> {array name: new array}: the same function as plain weights, if any.
    fixed: names of entries of t that are not trained.
    taps: the rule records arrays with `call.tap`.
    takes: names of keyword arguments that the rule takes for itself, at the model ('') alone: they
      are given to `tuned.apply` beside those of the model, and the rule does not pass them on.
    update, memory: as for Weight.
    method: the method of the module that is wrapped.
  """

  name: str
  apply: Callable[..., Any]
  init: Callable[..., Any] = _nothing
  merge: Callable[..., dict] | None = None
  fixed: tuple[str, ...] = ()
  taps: bool = False
  takes: tuple[str, ...] = ()
  update: Callable[..., Any] | None = None
  memory: str = MEMORY_CLASSES[-1]
  method: str = '__call__'


Rule = Weight | Call


class Method(tuple[tuple[str, Rule], ...]):
  """Rules and where they act: ((pattern, rule), ...). Methods are chained like Optax transforms."""

  __slots__ = ()

  @property
  def names(self) -> tuple[str, ...]:
    return tuple(dict.fromkeys(rule.name for _, rule in self))


def at(pattern: str, rule: Rule) -> Method:
  """A method of one rule.

  Args:
    pattern: a regex for whole paths such as 'encoder/block_3/attention/query'; roles in braces,
      such as '{q}' or '{block}', stand for the names that a model family uses.
    rule: what happens there.
  """
  return Method(((pattern, rule),))


def chain(*methods: Method) -> Method:
  """All rules of several methods. At one site Weights act before Calls, each in chain order."""
  return Method(pair for method in methods for pair in method)


def matrix(name: str, init, weight, dot=None, **options) -> Weight:
  """A Weight written for one [fan_in, fan_out] matrix, for every kernel of a site.

  Dense, DenseGeneral, Einsum, convolution and bare-param kernels are all one case: their axes are
  folded by how the program contracts them; batched kernels (experts) get one theta per matrix.

  Args:
    name: the method's name.
    init: (key, w) -> t.
    weight: (t, w) -> w'.
    dot: (t, x, y, w, key) -> y', see Weight.
    **options: further fields of Weight.
  """

  def mapped(fn, leaf: Leaf):
    for _ in leaf.batch:
      fn = jax.vmap(fn)
    return fn

  def init_site(key, site, arrays):
    theta = {}
    for array in site.matrices:
      leaf, sub = site.leaves[array], jax.random.fold_in(key, zlib.crc32(array.encode()))
      sizes = [leaf.shape[i] for i in leaf.batch]
      keys = jax.random.split(sub, sizes) if sizes else sub
      theta[array] = mapped(init, leaf)(keys, leaf.fold(arrays[array]))
    return theta

  def apply_site(theta, site, arrays):
    out = {}
    for array, t in theta.items():
      leaf = site.leaves[array]
      out[array] = leaf.unfold(mapped(weight, leaf)(t, leaf.fold(arrays[array])))
    return out

  def dot_site(theta, *rest):
    (t,) = theta.values()
    return dot(t, *rest)

  return Weight(name, init_site, apply_site, dot and dot_site, **options)
