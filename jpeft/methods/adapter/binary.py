"""Adapters and low-rank products whose weights have one bit, or a few, each.

Jie, Wang & Deng, 2023, "Revisiting the Parameter Efficiency of Adapters from the Perspective of
Precision Redundancy" (arXiv 2307.16867); official code JieShibo/PETL-ViT. Of a latent matrix W with
mean mu and standard deviation sigma (of n - 1) the model reads

  Q(W) = mu + sigma c((W - mu) / (sigma + 1e-5))

c(z) being the nearest of 2^b numbers, those that represent a normal distribution best (+-0.6745 for
b = 1); halfway it is the larger. The gradient takes c for the identity (straight through) and
crosses mu and sigma. Latent weights, their moments and Q(W) are float32 in training, so memory is
that of other adapters; what is stored of a task is small.

  Bi-AdaptFormer  y = u + MLP(LN u) + s drop(ReLU(u Q(down))) Q(up)     beside norm and MLP
  Bi-LoRA         y' = x w + s drop(x Q(down)) Q(up)                    merges
  Bi-Head         logits = x Q(W)                                       in place of the head

`down` starts as U(-1, 1) / sqrt(fan_in), `up` as normal numbers of std 1e-3, cut at two of them;
Q(up) is then near 0 and not 0, so the function starts close to the backbone. With bits=32 nothing
is quantised and `up` starts at 0.

`to_bits` writes a theta in b bits a weight: all codes, the lowest bit first, then mu and sigma of
each matrix and all other entries as float32. `from_bits` reads it as the theta of the same method
with bits=32, whose weights are the Q(W).

Deviations. Weights of a matrix are stored in the order of [fan_in, fan_out], the official code's
being [fan_out, fan_in].
"""

import dataclasses
import functools
import itertools
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import NO_BACKPROP, Bound, Method, Weight, at, entry_path, factory, matrix

from ..check import require, whole, within
from ..nn import drop, truncated_normal, uniform
from ..weight.lora import required
from .bottleneck import beside_norm_and_mlp

# Added to sigma where it divides.
_EPSILON = 1e-5
# The name of the entries that are quantised.
_LATENT = 'latent'
_WHOLE = 32
_MOST_BITS = 8


@factory
def bi_adaptformer(
  bottleneck: int = 32,
  bits: int = 1,
  scale: float = 0.1,
  dropout: float = 0.1,
  blocks: str = '{block}',
  stream: str = '{norm2}',
  name: str = 'bi_adaptformer',
) -> Method:
  """AdaptFormer in few bits, without biases.

  Args:
    bottleneck: width of the adapter.
    bits: b of a weight, 1 to 8; 32 for whole weights.
    scale: s, which the paper searches for each data set.
    dropout: rate on the bottleneck.
    blocks: pattern of the blocks, to whose output the adapter is added.
    stream: pattern of the modules, one in each block, whose input is what the adapter reads.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range; at the call, as `adaptformer`.
  """
  _check('bi_adaptformer', 'bottleneck', bottleneck, bits, dropout)
  adapter = _Adapter(bottleneck, bits, scale, dropout)
  return beside_norm_and_mlp(name, blocks, stream, adapter, exact=('down', 'up'))


@factory
def bi_lora(
  rank: int = 32,
  bits: int = 1,
  scale: float = 0.1,
  dropout: float = 0.1,
  targets: str = '{q}|{v}',
  name: str = 'bi_lora',
) -> Method:
  """A low-rank product in few bits.

  Args:
    rank: width of the bottleneck.
    bits: b of a weight, 1 to 8; 32 for whole weights.
    scale: s, which the paper searches for each data set.
    dropout: rate on the bottleneck.
    targets: pattern of sites; every kernel they own is adapted.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range.
  """
  _check('bi_lora', 'rank', rank, bits, dropout)

  def init(key, w):
    return pair(key, w.shape[0], rank, w.shape[1], bits)

  def weight(t, w):
    down, up = weights(t, bits)
    return w + (scale * (down @ up)).astype(w.dtype)

  def dot(t, x, y, w, key):
    down, up = weights(t, bits)
    hidden = drop(x @ down, key, dropout)
    return y + scale * (hidden @ up.astype(hidden.dtype))

  needs = required(dropout)
  return at(targets, matrix(name, init, weight, dot, exact=('down', 'up'), requires=needs))


@factory
def bi_head(bits: int = 1, targets: str = '{head}', name: str = 'bi_head') -> Method:
  """A fresh head in few bits, without a bias, in place of the model's own.

  Args:
    bits: b of a weight, 1 to 8; 32 for whole weights.
    targets: pattern of the head.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range.
  """
  _check_bits('bi_head', bits)

  def begin(key, w):
    return {_LATENT: uniform(key, w.shape, w.shape[0] ** -0.5)}

  rule = matrix(name, begin, lambda t, w: quantized(t[_LATENT], bits))

  def apply(t, site, arrays):
    rest = {array: jnp.zeros_like(arrays[array]) for array in site.leaves if array not in t}
    return {**rest, **rule.apply(t, site, arrays)}

  return at(targets, Weight(name, rule.init, apply, memory=NO_BACKPROP, head=True))


@dataclasses.dataclass(frozen=True)
class _Adapter:
  """The adapter of `bi_adaptformer`; the fields are its arguments."""

  bottleneck: int
  bits: int
  scale: float
  dropout: float

  def init(self, key, input, output) -> dict:
    """theta of one adapter, from the shapes of what it reads and of what it adds to."""
    return pair(key, input.shape[-1], self.bottleneck, output.shape[-1], self.bits)

  def branch(self, theta, call: Bound, x: jax.Array) -> jax.Array:
    """What is added to the stream beside x [.., d]."""
    down, up = (w.astype(x.dtype) for w in weights(theta, self.bits))
    key = None
    if self.dropout:
      key = call.rng('bi_adaptformer dropout')
    hidden = drop(jax.nn.relu(x @ down), key, self.dropout)
    return self.scale * (hidden @ up)


def pair(key, fan_in: int, width: int, fan_out: int, bits: int) -> dict:
  """The latent matrices of a bottleneck, {'down': {'latent'}, 'up': {'latent'}}."""
  key_down, key_up = jax.random.split(key)
  down = uniform(key_down, (fan_in, width), fan_in**-0.5)
  up = jnp.zeros((width, fan_out))
  if bits != _WHOLE:  # of equal numbers there is no sign
    up = 1e-3 * truncated_normal(key_up, (width, fan_out))
  return {'down': {_LATENT: down}, 'up': {_LATENT: up}}


def weights(t, bits: int) -> tuple[jax.Array, jax.Array]:
  """(down, up) as the model reads them."""
  return quantized(t['down'][_LATENT], bits), quantized(t['up'][_LATENT], bits)


# Quantisation


def quantized(latent: jax.Array, bits: int) -> jax.Array:
  """Q(W) of matrices W [.., k, n]; W itself for 32 bits."""
  if bits == _WHOLE:
    return latent
  mean, std = moments(latent)
  return mean + std * nearest((latent - mean) / (std + _EPSILON), bits)


def moments(latent: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(mu, sigma) [.., 1, 1] of matrices [.., k, n]."""
  axes = (-2, -1)
  mean = latent.mean(axes, keepdims=True)
  count = latent.shape[-2] * latent.shape[-1]
  variance = jnp.sum(jnp.square(latent - mean), axes, keepdims=True) / max(count - 1, 1)
  # The root has no gradient at 0, where all weights are equal.
  varies = variance > 0
  return mean, jnp.where(varies, jnp.sqrt(jnp.where(varies, variance, 1)), 0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def nearest(z: jax.Array, bits: int) -> jax.Array:
  """The nearest number of the codebook; its gradient is that of z."""
  return jnp.asarray(codebook(bits), z.dtype)[codes(z, bits)]


@nearest.defjvp
def _straight_through(bits, primals, tangents):
  return nearest(primals[0], bits), tangents[0]


def codes(z: jax.Array, bits: int) -> jax.Array:
  """The place in the codebook of the nearest number; halfway between two the larger one's."""
  values = codebook(bits)
  found = jnp.zeros(z.shape, jnp.int32)
  for low, high in itertools.pairwise(values):
    found += z >= (low + high) / 2
  return found


@functools.cache
def codebook(bits: int) -> tuple[float, ...]:
  """The 2^bits numbers that represent a standard normal distribution, in rising order.

  Each is the number at the middle of the probability of its cell, and the cells end half way
  between two numbers.
  """
  normal = statistics.NormalDist()
  count = 2**bits
  values = [normal.inv_cdf((i + 0.5) / count) for i in range(count)]
  for _ in range(500):
    edges = [(low + high) / 2 for low, high in itertools.pairwise(values)]
    ends = [0.0, *map(normal.cdf, edges), 1.0]
    values = [normal.inv_cdf((low + high) / 2) for low, high in itertools.pairwise(ends)]
  return tuple(values)


# Files


def to_bits(theta: Any, bits: int = 1) -> bytes:
  """A theta with its latent matrices in few bits a weight.

  Args:
    theta: of binary adapters, and of other methods such as a trained head.
    bits: those of the method, 1 to 8.
  """
  latents, others = _apart(theta)
  stream = []
  scales = []
  for latent in latents:
    mean, std = moments(latent)
    own = np.asarray(codes((latent - mean) / (std + _EPSILON), bits), np.uint8).reshape(-1, 1)
    unpacked = np.unpackbits(own, axis=1, count=bits, bitorder='little')
    stream.append(unpacked.reshape(-1))
    scales.append(np.stack([mean.reshape(-1), std.reshape(-1)], 1))  # [matrices, 2]
  packed = np.packbits(np.concatenate([np.zeros(0, np.uint8), *stream]), bitorder='little')
  numbers = [np.asarray(x, '<f4').tobytes() for x in (*scales, *others)]
  return packed.tobytes() + b''.join(numbers)


def from_bits(data: bytes, shapes: Any, bits: int = 1) -> Any:
  """What `to_bits` wrote, as the theta of the same method with bits=32.

  Args:
    data: the bytes.
    shapes: `tuned.shapes` of the method.
    bits: with which it was written.

  Raises:
    ValueError: data of another length than a theta of these shapes has.
  """
  latents, others = _apart(shapes)
  count = sum(x.size for x in latents)
  matrices = [x.size // (x.shape[-2] * x.shape[-1]) for x in latents]
  start = (count * bits + 7) // 8
  wanted = start + 4 * (2 * sum(matrices) + sum(x.size for x in others))
  if len(data) != wanted:
    raise ValueError(
      f'{len(data)} bytes are no theta of this method in {bits} bits a weight, which has {wanted}: '
      'was it written with other hyperparameters, or for another model?'
    )
  stream = np.unpackbits(np.frombuffer(data[:start], np.uint8), bitorder='little')
  places = stream[: count * bits].reshape(count, bits) @ (1 << np.arange(bits))
  scales, rest = np.split(np.frombuffer(data[start:], '<f4'), [2 * sum(matrices)])
  values = iter(_split(np.asarray(codebook(bits), np.float32)[places], latents))
  scales_of = iter(np.split(scales.reshape(-1, 2), np.cumsum(matrices)))
  whole_of = iter(_split(rest, others))

  def read(path, shape):
    if not _is_latent(path):
      return jnp.asarray(next(whole_of))
    value = next(values)
    mean, std = (x.reshape(*value.shape[:-2], 1, 1) for x in next(scales_of).T)
    return jnp.asarray(mean + std * value)

  return jax.tree_util.tree_map_with_path(read, shapes)


def _is_latent(path) -> bool:
  return entry_path(path)[-1] == _LATENT


def _apart(theta) -> tuple[list, list]:
  """(the latent matrices of a theta, its other entries)."""
  leaves = jax.tree_util.tree_leaves_with_path(theta)
  latents = [x for path, x in leaves if _is_latent(path)]
  return latents, [x for path, x in leaves if not _is_latent(path)]


def _split(flat: np.ndarray, like) -> list[np.ndarray]:
  """Numbers in a row as arrays of some shapes."""
  parts = np.split(flat, np.cumsum([x.size for x in like]))
  return [part.reshape(x.shape) for part, x in zip(parts, like, strict=False)]


def _check(method: str, size: str, value: int, bits: int, dropout: float) -> None:
  whole(method, size, value, 1)
  _check_bits(method, bits)
  within(method, 'dropout', dropout, 0, 1)


def _check_bits(method: str, bits: int) -> None:
  known = bits == _WHOLE or bits in range(1, _MOST_BITS + 1)
  require(known, method, 'bits', bits, f'must be 1 to {_MOST_BITS}, or {_WHOLE} for whole weights')
