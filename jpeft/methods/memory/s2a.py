"""S2A: little that is trained, and four bits a value for what the backward pass keeps (arXiv
2503.08154).

A frozen linear layer needs nothing but its own weight to pass a gradient on. What training then
keeps are the inputs of norms, softmax and activations; S2A keeps those in 4 bits, and trains only
what needs no more:

  bias                 b, whose gradient is a sum                                   nothing
  low-rank prompt      x + A B, A [N, r], B [r, D], the same for every example      nothing of x
  lite side module     block(x) + gelu(mean_c(x) W1) W2, W1 [D/c, m], W2 [m, D]     1/c of x, by a mean of c channels

The paper has no public code. Where prompts and side modules stand, their ranks, and how softmax and
norms are coded are therefore a reconstruction: prompts enter each block with its input, the side
module stands beside the block, and the defaults train about 0.9 % of a ViT-B, as the paper reports.
What is stored how: `jpeft.quant.residuals`. Query, key and value are kept in 8 bits rather than 4:
the probabilities that are computed from them again double their error.

The 4-bit storage alone is `packed()`, for any method: chain(lora(8), packed()). It wraps what
stands before it in the chain, so it comes last. The forward pass is exact; gradients carry the
rounding of what was kept.
"""

import math

import jax
import jax.numpy as jnp

from jpeft import residuals
from jpeft.core import Call, Method, at, chain, factory
from jpeft.residuals import compressed

from ..subset.tune import tune


@factory
def packed(
  blocks: str = '{block}', bits: int = 4, operand_bits: int = 8, name: str = 'packed'
) -> Method:
  """Keeps what the backward pass of each block needs in few bits; trains nothing itself.

  What a block writes (caches, running statistics) and what rules before it in the chain tap there
  is dropped.

  Args:
    blocks: pattern of the modules whose residuals are compressed, each as a whole.
    bits: of a value, in groups of 64: 4 or 8.
    operand_bits: of query, key and value.
    name: of the rule; theta has no entry.

  Raises:
    ValueError: bits other than 4 and 8.
  """
  _check_bits(bits, operand_bits)

  def apply(t, call, *args, **kwargs):
    fn, arrays = call.pure()
    return compressed(fn, bits, operand_bits)(arrays, *args, **kwargs)

  return at(blocks, Call(name, apply))


@factory
def s2a(
  rank: int = 8,
  side: int = 48,
  pool: int = 4,
  bits: int = 4,
  operand_bits: int = 8,
  biases: str | None = '(?!{head}$).*',
  blocks: str = '{block}',
  name: str = 's2a',
) -> Method:
  """Biases, low-rank prompts and lite side modules, with 4-bit storage.

  Args:
    rank: r of the prompts; 0 for none.
    side: m, the width of the side modules; 0 for none.
    pool: c, how many neighbouring channels a side module reads as their mean.
    bits: of a value that the backward pass of a block keeps: 4 or 8.
    operand_bits: of query, key and value.
    biases: pattern of the sites whose biases are trained; None for none.
    blocks: pattern of the blocks.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, a block without a stream of
      features that keeps its shape, or a width that `pool` does not divide.
  """
  for value, least, what in ((rank, 0, 'rank'), (side, 0, 'side'), (pool, 1, 'pool')):
    if int(value) != value or value < least:
      raise ValueError(f's2a: {what}={value!r} must be a whole number, at least {least}')
  _check_bits(bits, operand_bits)

  def init(key, site, arrays):
    shape = _stream(site, name) if rank or side else ()
    t, keys = {}, jax.random.split(key)
    if rank:
      places = math.prod(shape[1:-1])
      t['prompt'] = {
        'a': 0.02 * jax.random.normal(keys[0], (places, rank)),
        'b': jnp.zeros((rank, shape[-1])),
      }
    if side:
      if shape[-1] % pool:
        raise ValueError(f's2a: pool={pool} does not divide the width {shape[-1]} of {site.path!r}')
      fan_in = shape[-1] // pool
      t['side'] = {
        'down': jax.random.normal(keys[1], (fan_in, side)) * fan_in**-0.5,
        'up': jnp.zeros((side, shape[-1])),
      }
    return t

  def apply(t, call, x, *args, **kwargs):
    fn, arrays = call.pure()

    def block(held, x, *args, **kwargs):
      arrays, t = held
      out = fn(arrays, x + _prompt(t['prompt'], x, call.site) if rank else x, *args, **kwargs)
      if not side:
        return out
      first, *rest = leaves = jax.tree.leaves(out)
      first = first + _side(t['side'], x, pool).astype(first.dtype)
      return jax.tree.unflatten(jax.tree.structure(out), [first, *rest]) if leaves else out

    return compressed(block, bits, operand_bits)((arrays, t), x, *args, **kwargs)

  modules = at(blocks, Call(name, apply, init))
  return modules if biases is None else chain(tune(biases, 'bias', name), modules)


def _check_bits(*bits: int) -> None:
  for n in bits:
    if n not in (4, 8):
      raise ValueError(f'values are kept in 4 or 8 bits, not {n!r}')


def _stream(site, name: str) -> tuple[int, ...]:
  """The shape of the features that a block reads, and gives back."""
  shapes = [None if s is None else s.shape for s in (site.input, site.out)]
  if None in shapes or shapes[0] != shapes[1] or len(shapes[0]) < 3:
    raise ValueError(
      f'{name}: prompts and side modules need a stream that keeps its shape [B, .., D], and {site.kind} '
      f'at {site.path!r} reads {shapes[0]} and gives {shapes[1]}; use rank=0, side=0'
    )
  return shapes[0]


def _prompt(t, x, site):
  """A B, [1, .., D]: a row for each place, or for the first ones of a shorter sequence."""
  places = x[0, ..., 0].size
  if places > len(t['a']) or places < len(t['a']) and x.ndim > 3:
    raise ValueError(
      f'the prompts of {site.path!r} are for {len(t["a"])} places, and its input has {places}'
    )
  return (t['a'][:places] @ t['b']).reshape(1, *x.shape[1:]).astype(x.dtype)


def _side(t, x, pool: int):
  means = x.reshape(*x.shape[:-1], -1, pool).mean(-1)
  return residuals.gelu(means @ t['down']) @ t['up']
