"""(IA)^3: learned vectors that scale keys, values and the inner activations of the MLP.

Liu et al., 2022 (arXiv 2205.05638); official code r-three/t-few.

  keys, values   y' = l * (x w + b), one number per output       w' = w * l over its columns, b' = l * b
  MLP            y' = (l * x) w + b, one number per input        w' = w * l over its rows, b' = b

All l start at one, so the function starts unchanged, bit for bit. Both forms are a plain change of
weights: they merge exactly, and act on bare einsum weights as on layers. Of a convolution l scales
channels.

Deviations. The paper scales the activation between the two MLP layers; scaling what enters the
second one is the same function, for gated MLPs too (official code: what leaves the linear branch).
The official code writes l as one factor of a rank-1 product whose other factor is held at one. The
files of Hugging Face peft hold l of the output form as [out, 1] and of the input form as [1, in].
Weight decay must be off, or it pulls l to zero; the recipe's unlikelihood and length-normalised
losses belong to the task, not to the method.
"""

import math
import re

import jax.numpy as jnp

from jpeft.core import Leaf, Method, Site, Weight, at, chain, factory


@factory
def ia3(
  targets_out: str | None = '{k}|{v}',
  targets_in: str | None = '{fc2}',
  arrays: str = '.*',
  name: str = 'ia3',
) -> Method:
  """Scales what comes out of some layers and what goes into others.

  Args:
    targets_out: pattern of sites whose outputs are scaled; None for none.
    targets_in: pattern of sites whose inputs are scaled; None for none.
    arrays: regex of the names of the kernels, for modules that own several bare ones.
    name: in theta.

  Raises:
    ValueError: nothing is targeted.
  """
  if targets_out is None and targets_in is None:
    raise ValueError('ia3 needs a pattern for targets_out or targets_in, not None for both')
  chosen = re.compile(arrays)
  outputs = _scaling(name, chosen, _outputs, lambda l, x, y, w: y * l, _biases)
  inputs = _scaling(
    name, chosen, _inputs, lambda l, x, y, w: x.map(lambda v: v * _last(l, v.shape)) @ w()
  )
  return chain(
    at(targets_out, outputs) if targets_out is not None else (),
    at(targets_in, inputs) if targets_in is not None else (),
  )


def _scaling(name: str, chosen: re.Pattern, axes_of, dot, added=lambda site, leaf: []) -> Weight:
  """w * l for every kernel, l along the axes that axes_of(leaf) gives; and l * what is `added` to
  it.
  """

  def init(key, site, p):
    leaves = {n: site.leaves[n] for n in site.matrices if chosen.fullmatch(n)}
    return {n: jnp.ones(_size(leaf, axes_of(leaf))) for n, leaf in leaves.items()}

  def apply(t, site, p):
    new = {}
    for n, l in t.items():
      leaf = site.leaves[n]
      new[n] = p[n] * l.reshape([d if i in axes_of(leaf) else 1 for i, d in enumerate(leaf.shape)])
      new |= {b: p[b] * l.reshape(site.leaves[b].shape) for b in added(site, leaf)}
    return new

  def dot_site(t, x, y, w, key):
    (l,) = t.values()
    return dot(l, x, y, w)

  return Weight(name, init, apply, dot_site)


def _outputs(leaf: Leaf) -> tuple[int, ...]:
  return tuple(sorted(leaf.batch + leaf.outs))


def _inputs(leaf: Leaf) -> tuple[int, ...]:
  """All contracted axes; of a convolution the last, its channels."""
  ins = leaf.ins[-1:] if leaf.use == 'conv_general_dilated' else leaf.ins
  return tuple(sorted(leaf.batch + ins))


def _biases(site: Site, kernel: Leaf) -> list[str]:
  """What the site adds to the kernel's product: arrays of one number per output."""
  return [
    n
    for n, leaf in site.leaves.items()
    if leaf.use == 'add' and math.prod(leaf.shape) == _size(kernel, _outputs(kernel))
  ]


def _size(leaf: Leaf, axes: tuple[int, ...]) -> int:
  return math.prod(leaf.shape[i] for i in axes)


def _last(l, shape: tuple[int, ...]):
  """The vector l in the shape of the last axes of `shape`, as many as it fills."""
  n = next(n for n in range(1, len(shape) + 1) if math.prod(shape[-n:]) == l.size)
  return l.reshape(shape[-n:])
