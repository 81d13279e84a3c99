"""(IA)^3: learned vectors that scale keys, values and the inner activations of the MLP.

Liu et al., 2022 (arXiv 2205.05638); official code r-three/t-few.

  keys, values   y' = l * (x w + b)    one number an output   w' = w * l over its columns, b' = l b
  MLP            y' = (l * x) w + b    one number an input    w' = w * l over its rows, b' = b

All l start at one, so the function starts unchanged, bit for bit. theta of a site is {kernel name:
l}. Both forms are a plain change of
weights: they merge exactly, and act on bare einsum weights as on layers. Of a convolution l scales
channels.

Deviations. The paper scales the activation between the two MLP layers; scaling what enters the
second one is the same function, for gated MLPs too (official code: what leaves the linear branch).
The official code writes l as one factor of a rank-1 product whose other factor is held at one. The
files of Hugging Face peft have l of the output form as [out, 1] and of the input form as [1, in].
Weight decay must be off, or it pulls l to zero; the recipe's unlikelihood and length-normalised
losses belong to the task, not to the method.
"""

import math
import re

import jax
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
  pattern = re.compile(arrays)
  methods = []
  if targets_out is not None:
    methods.append(at(targets_out, _scaled_outputs(name, pattern)))
  if targets_in is not None:
    methods.append(at(targets_in, _scaled_inputs(name, pattern)))
  return chain(*methods)


def _scaled_outputs(name: str, pattern: re.Pattern) -> Weight:
  """y' = l * (x w + b)."""

  def init(key, site, arrays):
    return {n: _ones(leaf, _output_axes(leaf)) for n, leaf in _kernels(site, pattern).items()}

  def apply(theta, site, arrays):
    new = {}
    for kernel, l in theta.items():
      leaf = site.leaves[kernel]
      new[kernel] = arrays[kernel] * _along(l, leaf, _output_axes(leaf))
      for bias in _biases(site, leaf):
        new[bias] = arrays[bias] * l.reshape(site.leaves[bias].shape)
    return new

  def dot(theta, x, y, w, key):
    (l,) = theta.values()
    return y * l

  return Weight(name, init, apply, dot)


def _scaled_inputs(name: str, pattern: re.Pattern) -> Weight:
  """y' = (l * x) w + b."""

  def init(key, site, arrays):
    return {n: _ones(leaf, _input_axes(leaf)) for n, leaf in _kernels(site, pattern).items()}

  def apply(theta, site, arrays):
    new = {}
    for kernel, l in theta.items():
      leaf = site.leaves[kernel]
      new[kernel] = arrays[kernel] * _along(l, leaf, _input_axes(leaf))
    return new

  def dot(theta, x, y, w, key):
    (l,) = theta.values()
    scaled = x.map(lambda v: v * _as_last_axes(l, v.shape))
    return scaled @ w()

  return Weight(name, init, apply, dot)


def _kernels(site: Site, pattern: re.Pattern) -> dict[str, Leaf]:
  """The kernels of a site whose names match."""
  return {name: site.leaves[name] for name in site.matrices if pattern.fullmatch(name)}


def _output_axes(leaf: Leaf) -> tuple[int, ...]:
  """The axes of a kernel that l of the output form scales; of experts, each has an l of its own."""
  return tuple(sorted(leaf.batch + leaf.outs))


def _input_axes(leaf: Leaf) -> tuple[int, ...]:
  """All contracted axes; of a convolution the last, its channels."""
  inputs = leaf.ins
  if leaf.use == 'conv_general_dilated':
    inputs = inputs[-1:]
  return tuple(sorted(leaf.batch + inputs))


def _biases(site: Site, kernel: Leaf) -> list[str]:
  """What the site adds to the kernel's product: arrays of one number per output."""
  size = _size(kernel, _output_axes(kernel))
  return [
    name
    for name, leaf in site.leaves.items()
    if leaf.use == 'add' and math.prod(leaf.shape) == size
  ]


def _size(leaf: Leaf, axes: tuple[int, ...]) -> int:
  return math.prod(leaf.shape[i] for i in axes)


def _ones(leaf: Leaf, axes: tuple[int, ...]) -> jax.Array:
  """l as it starts, one number for each index along `axes` of a kernel."""
  return jnp.ones(_size(leaf, axes))


def _along(l: jax.Array, leaf: Leaf, axes: tuple[int, ...]) -> jax.Array:
  """l in a shape that broadcasts over the kernel, along `axes`."""
  shape = [1] * len(leaf.shape)
  for axis in axes:
    shape[axis] = leaf.shape[axis]
  return l.reshape(shape)


def _as_last_axes(l: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """l in the shape of the last axes of `shape`: of as many as its size fills."""
  # A layer that contracts several axes, such as heads and head size, has one number for each index.
  count = 1
  while math.prod(shape[-count:]) != l.size:
    count += 1
  return l.reshape(shape[-count:])
