"""S2A: little that is trained, and four bits a value for what the backward pass stores.

arXiv 2503.08154, 2025. A frozen linear layer needs nothing but its own weight to pass a gradient
on. What training then stores are the inputs of norms, softmax and activations; S2A stores those in
4 bits, and trains only what needs little of its input x for its own gradient:

                       what is computed                                          stored of x
  bias                 b, whose gradient is a sum                                nothing
  low-rank prompt      x + A B, the same for every example                       nothing
  lite side module     block(x) + gelu(mean_c(x) W1) W2, means of c channels     1/c

A [N, r], B [r, D], W1 [D/c, m], W2 [m, D].

The paper has no public code. Where prompts and side modules stand, their ranks, and how softmax and
norms are coded are therefore a reconstruction: prompts enter each block with its input, the side
module stands beside the block, and the defaults train about 0.9 % of a ViT-B, as the paper reports.
How values are coded: `jpeft.residuals`. Query, key and value are stored in 8 bits rather than 4:
the probabilities that are computed from them again double their error.

The 4-bit storage alone is `packed()`, for any method: chain(lora(8), packed()). It wraps what
stands before it in the chain, so it comes last. The forward pass is exact; gradients contain the
rounding of what was stored.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jpeft import residuals
from jpeft.core import Call, Method, Site, at, chain, factory

from ..check import whole
from ..subset.tune import tune


@factory
def packed(
  blocks: str = '{block}',
  bits: int = 4,
  operand_bits: int = 8,
  recompute: bool = False,
  name: str = 'packed',
) -> Method:
  """Stores what the backward pass of each block needs in few bits; trains nothing itself.

  What a block writes (caches, running statistics) is dropped, and so is what rules before this one
  in the chain tap there.

  Args:
    blocks: pattern of the modules whose residuals are compressed, each as a whole.
    bits: of a value, in groups of 64: 4 or 8.
    operand_bits: of query, key and value.
    recompute: keep the input of each block alone, in `bits`, and run the block again from it: less
      memory, and on a TPU less time. Of our own models `remat='packed'` does the same, and keeps
      what a block writes.
    name: of the rule; theta has no entry.

  Raises:
    ValueError: bits other than 4 and 8.
  """
  _check_bits(bits, operand_bits)

  def apply(t, call, *args, **kwargs):
    fn, arrays = call.pure()
    if recompute:
      run = residuals.recomputed(fn, bits, _is_unrolled(call.site))
    else:
      run = residuals.compressed(fn, bits, operand_bits, _is_unrolled(call.site))
    return run(arrays, *args, **kwargs)

  return at(blocks, Call(name, apply, saved_bits=bits))


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
    bits: of a value that the backward pass of a block stores: 4 or 8.
    operand_bits: of query, key and value.
    biases: pattern of the sites whose biases are trained; None for none.
    blocks: pattern of the blocks.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, a block without a stream of
      features that keeps its shape, or a width that `pool` does not divide.
  """
  whole('s2a', 'rank', rank, 0)
  whole('s2a', 'side', side, 0)
  whole('s2a', 'pool', pool, 1)
  _check_bits(bits, operand_bits)
  modules = _S2A(rank, side, pool, bits, operand_bits, blocks, name).method()
  if biases is None:
    return modules
  ((pattern, rule),) = tune(biases, 'bias', name)
  rule = dataclasses.replace(rule, hint='a model without biases takes biases=None')
  return chain(at(pattern, rule), modules)


@dataclasses.dataclass(frozen=True, eq=False)
class _S2A:
  """The prompts and side modules of `s2a`; the fields are its arguments.

  theta[name][block] is {'prompt': {'a', 'b'}, 'side': {'down', 'up'}}, those with a rank or width.
  """

  rank: int
  side: int
  pool: int
  bits: int
  operand_bits: int
  blocks: str
  name: str

  def method(self) -> Method:
    return at(self.blocks, Call(self.name, self.apply, self.init, saved_bits=self.bits))

  def init(self, key, site: Site, arrays) -> dict:
    """Starts as the backbone: B and W2 are zero."""
    t = {}
    if not self.rank and not self.side:
      return t
    shape = self.stream(site)
    width = shape[-1]
    key_prompt, key_side = jax.random.split(key)
    if self.rank:
      places = math.prod(shape[1:-1])
      t['prompt'] = {
        'a': 0.02 * jax.random.normal(key_prompt, (places, self.rank)),
        'b': jnp.zeros((self.rank, width)),
      }
    if self.side:
      if width % self.pool:
        raise ValueError(
          f's2a: pool={self.pool} does not divide the width {width} of {site.path!r}'
        )
      fan_in = width // self.pool
      t['side'] = {
        'down': fan_in**-0.5 * jax.random.normal(key_side, (fan_in, self.side)),
        'up': jnp.zeros((self.side, width)),
      }
    return t

  def stream(self, site: Site) -> tuple[int, ...]:
    """The shape [B, .., D] of what a block reads and returns.

    Raises:
      ValueError: the block has no such stream, or changes its shape.
    """
    read = _shape(site.input)
    given = _shape(site.out)
    if read is None or read != given or len(read) < 3:
      raise ValueError(
        f'{self.name}: prompts and side modules need a stream that keeps its shape [B, .., D], and '
        f'{site.kind} at {site.path!r} reads {read} and gives {given}; use rank=0, side=0'
      )
    return read

  def apply(self, t, call, x, *args, **kwargs):
    """Runs a block with its prompt and its side module, all of it with compressed residuals."""
    fn, arrays = call.pure()

    def block(arrays_and_t, x, *args, **kwargs):
      arrays, t = arrays_and_t
      prompted = x
      if self.rank:
        prompted = x + _prompt(t['prompt'], x, call.site)
      out = fn(arrays, prompted, *args, **kwargs)
      if not self.side:
        return out
      beside = self.beside(t['side'], x)
      return call.site.map_stream(out, lambda y: y + beside.astype(y.dtype))

    run = residuals.compressed(block, self.bits, self.operand_bits, _is_unrolled(call.site))
    return run((arrays, t), x, *args, **kwargs)

  def beside(self, t, x: jax.Array) -> jax.Array:
    """What the side module adds: gelu(mean_c(x) W1) W2."""
    # The product of means with W1 is one of x with its rows repeated: a TPU is slow at means of
    # neighbours.
    down = jnp.repeat(t['down'] / self.pool, self.pool, 0)
    # The library's own GELU, whose backward pass stores codes of its derivative.
    hidden = residuals.gelu(x @ down)
    return hidden @ t['up']


def _shape(array: jax.ShapeDtypeStruct | None) -> tuple[int, ...] | None:
  return None if array is None else array.shape


def _is_unrolled(site: Site) -> bool:
  """Whether XLA sees forward and backward pass of a block as one program: outside of a scan."""
  return site.layers == 1


def _check_bits(*bits: int) -> None:
  for n in bits:
    if n not in (4, 8):
      raise ValueError(f'values are kept in 4 or 8 bits, not {n!r}')


def _prompt(t, x: jax.Array, site: Site) -> jax.Array:
  """A B, [1, .., D]: a row for each place, or for the first ones of a shorter sequence."""
  rows = len(t['a'])
  places = math.prod(x.shape[1:-1])
  # Rows of a map are not in the order of a smaller one: there every place must have its own.
  is_map = x.ndim > 3
  if places > rows or (is_map and places < rows):
    raise ValueError(
      f'the prompts of {site.path!r} are for {rows} places, and its input has {places}'
    )
  prompt = t['a'][:places] @ t['b']
  return prompt.reshape(1, *x.shape[1:]).astype(x.dtype)
