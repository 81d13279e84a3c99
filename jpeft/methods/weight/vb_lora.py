"""VB-LoRA: LoRA whose factors are mixed from one bank of short vectors that all layers share.

Li et al., 2024 (arXiv 2405.15179). The bank c [h, b] has h vectors of b numbers. The columns of
a [fan_in, r] and the rows of b [r, fan_out] are cut into pieces of b numbers. A piece has logits
z [h], and is a mixture of the k vectors with the largest ones:

  piece = sum over i in top_k(z) of p_i c_i       p = softmax of these k logits
  w' = w + a b                                    y' = y + (x a) b

What is trained is the bank, once, and h logits a piece. What has to be kept after training is the
bank, and k numbers and k - 1 weights a piece.

In the files of Hugging Face peft c is vblora_vector_bank, and z is vblora_logits_A [r, fan_in / b,
h] and vblora_logits_B [fan_out / b, r, h], the layout that theta has here as well.

The paper starts from random logits and vectors: a b is of the order of the square of `bound`, and
the function starts near the backbone and not at it. It trains the bank with a tenth of the logits'
learning rate, 0.001 beside 0.01: optimizer.groups=(('.*/bank', 0.1),) does so.

Deviations. A convolution is folded to a matrix as for LoRA. Logits are trained and stored whole;
peft's `save_only_topk_weights` is read, and such a theta can be used but not trained on: logits
outside of the k have weight 0 for ever.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jpeft.core import Method, Place, Site, at, factory, generated, matrix

from ..check import at_least, require, whole
from ..nn import drop, uniform
from .lora import check_rank, required, tables


@factory
def vb_lora(
  rank: int = 4,
  vectors: int = 256,
  length: int = 256,
  topk: int = 2,
  targets: str = '{q}|{v}',
  dropout: float = 0.0,
  bound: float = 0.02,
  std: float = 0.1,
  name: str = 'vb_lora',
) -> Method:
  """Vector-bank low-rank adaptation.

  Args:
    rank: r.
    vectors: h, vectors of the bank.
    length: b, numbers of a vector; it divides the sides of every kernel.
    topk: k, vectors that are mixed.
    targets: pattern of sites; every kernel they own is adapted.
    dropout: rate on what enters a.
    bound: the bank starts uniform in [-bound, bound].
    std: standard deviation of the logits at the start.
    name: in theta: at the path '' {'bank': [h, b]}, and for each kernel
      {'logits_a': [r, fan_in / b, h], 'logits_b': [fan_out / b, r, h]}.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, a kernel with a side that `length`
      does not divide, or an embedding table.
  """
  check_rank(rank, dropout)
  whole('vb_lora', 'vectors', vectors, 1)
  whole('vb_lora', 'length', length, 1)
  whole('vb_lora', 'topk', topk, 1)
  require(topk <= vectors, 'vb_lora', 'topk', topk, f'must be at most vectors={vectors}')
  require(bound > 0, 'vb_lora', 'bound', bound, 'must be greater than 0')
  at_least('vb_lora', 'std', std, 0)

  def init(key, w):
    return {'a': jnp.zeros((w.shape[0], rank)), 'b': jnp.zeros((rank, w.shape[1]))}

  def weight(t, w):
    return w + (t['a'] @ t['b']).astype(w.dtype)

  def dot(t, x, y, w, key):
    return y + (x.map(lambda v: drop(v, key, dropout)) @ t['a']) @ t['b']

  rule = matrix(name, init, weight, dot, requires=required(dropout))

  def init_site(key, site: Site, arrays):
    if tables(site) and not site.matrices:
      raise ValueError(
        f'{name}: {site.path!r} is an embedding table, whose rows are looked up, and VB-LoRA '
        'adapts products: leave it out of targets, or adapt it by lora or dora'
      )
    made = rule.init(key, site, arrays)
    for array, t in made.items():
      for size in (t['a'].shape[-2], t['b'].shape[-1]):
        require(
          size % length == 0,
          name,
          'length',
          length,
          f'does not divide {size}, a side of '
          f'{site.path}/{array}: choose a common divisor of all sides',
        )
    return made

  bank = _Bank(vectors, length, topk, bound, std)
  method = at(targets, dataclasses.replace(rule, init=init_site))
  return generated(method, bank.init, bank.expand)


@dataclasses.dataclass(frozen=True)
class _Bank:
  """The factors of all layers as a function of one bank and of logits."""

  vectors: int
  length: int
  topk: int
  bound: float
  std: float

  def init(self, key, places: Mapping[str, Place]) -> dict:
    shape = self.vectors, self.length
    key_bank, key_logits = jax.random.split(key)
    made: dict[str, dict] = {'': {'bank': uniform(key_bank, shape, self.bound)}}
    for number, (path, place) in enumerate(places.items()):
      own_key = jax.random.fold_in(key_logits, number)
      made[path] = {}
      for index, (array, t) in enumerate(place.t.items()):
        keys = jax.random.split(jax.random.fold_in(own_key, index))
        *stack, fan_in, rank = t['a'].shape
        fan_out = t['b'].shape[-1]
        of_a = *stack, rank, fan_in // self.length, self.vectors
        of_b = *stack, fan_out // self.length, rank, self.vectors
        made[path][array] = {
          'logits_a': self.std * jax.random.normal(keys[0], of_a),
          'logits_b': self.std * jax.random.normal(keys[1], of_b),
        }
    return made

  def expand(self, t, places: Mapping[str, Place]) -> dict:
    bank = t['']['bank']
    return {
      path: {array: mixed(own, bank, self.topk) for array, own in t[path].items()}
      for path in places
    }


def mixed(t: Mapping[str, jax.Array], bank: jax.Array, topk: int) -> dict[str, jax.Array]:
  """{'a': [.., fan_in, r], 'b': [.., r, fan_out]} of the logits of a kernel and the bank."""
  of_a = _pieces(t['logits_a'], bank, topk)  # [.., r, fan_in / b, b]
  of_b = _pieces(t['logits_b'], bank, topk)  # [.., fan_out / b, r, b]
  *stack, rank, _, _ = of_a.shape
  a = of_a.reshape(*stack, rank, -1)
  b = jnp.moveaxis(of_b, -2, -3).reshape(*stack, rank, -1)
  return {'a': a.swapaxes(-1, -2), 'b': b}


def _pieces(logits: jax.Array, bank: jax.Array, topk: int) -> jax.Array:
  """[.., b] of logits [.., h] and a bank [h, b]."""
  largest, chosen = jax.lax.top_k(logits, topk)
  return jnp.einsum('...k,...kb->...b', jax.nn.softmax(largest), bank[chosen])
