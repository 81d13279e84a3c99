"""LoHa and HiRA: entrywise products, of any rank, of matrices of low rank.

LoHa: Hyeon-Woo et al., 2021, "FedPara" (arXiv 2108.06098), as LyCORIS has it (2309.14859). HiRA:
Huang et al., 2025 (openreview TwJrTz9cRS). For a kernel w [fan_in, fan_out] (the papers' W is its
transpose), factors a, u [fan_in, r], b, v [r, fan_out], * entrywise:

  LoHa  w' = w + s (a1 b1) * (a2 b2)      s = alpha / r; rank up to r^2; a2 = 0 at first
  HiRA  w' = w + w * (u v)                rank up to r rank(w); v = 0 at first

The product of LoHa is one of r^2 low-rank terms, (a1 b1) * (a2 b2) = a b with a [fan_in, r^2] all
products of a column of a1 with one of a2, and b [r^2, fan_out] likewise. Where r^2 is small beside
the kernel the layer computes y' = y + s (x a) b, as LoRA of that rank does, and no array of the
kernel's size is formed. Elsewhere, and for HiRA, w' is formed, and again in the backward pass.

In the files of Hugging Face peft hada_w1_a is b1.T, hada_w1_b is a1.T, hira_A is u.T, hira_B is
v.T.

Deviations. A convolution is folded to a matrix as for LoRA; of LyCORIS's factors of its window
there are none. Of HiRA peft has no scale, and there is none here.
"""

import jax
import jax.numpy as jnp

from jpeft.core import Method, at, factory, matrix

from ..check import require
from ..nn import uniform
from .lora import check_rank, required
from .snell import changed_product


@factory
def loha(rank: int = 8, alpha: float = 8, targets: str = '{q}|{v}', name: str = 'loha') -> Method:
  """Low-rank Hadamard product adaptation.

  Args:
    rank: r, of each of the two products.
    alpha: the update is scaled by alpha / rank.
    targets: pattern of sites; every kernel they own is adapted.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range.
  """
  check_rank(rank, 0)
  require(alpha > 0, 'loha', 'alpha', alpha, 'must be greater than 0')
  scale = alpha / rank

  def init(key, w):
    fan_in, fan_out = w.shape
    key_a1, key_b1, key_b2 = jax.random.split(key, 3)
    return {
      'a1': uniform(key_a1, (fan_in, rank), fan_in**-0.5),
      'b1': uniform(key_b1, (rank, fan_out), rank**-0.5),
      'a2': jnp.zeros((fan_in, rank)),
      'b2': uniform(key_b2, (rank, fan_out), rank**-0.5),
    }

  def update(t):
    return scale * (t['a1'] @ t['b1']) * (t['a2'] @ t['b2'])

  def weight(t, w):
    return w + update(t).astype(w.dtype)

  def dot(t, x, y, w, key):
    fan_in, fan_out = x.fan_in, y.shape[-1]
    if rank**2 * (fan_in + fan_out) <= fan_in * fan_out:
      low = x @ products_of_columns(t['a1'], t['a2'])  # [.., r^2]
      return y + scale * (low @ products_of_columns(t['b1'].T, t['b2'].T).T)
    return changed_product(update, t, x, y, w, key, 0, 0)

  return at(targets, matrix(name, init, weight, dot))


def products_of_columns(one: jax.Array, other: jax.Array) -> jax.Array:
  """[n, r r'] of [n, r] and [n, r']: each column of one times each of the other, entrywise."""
  return (one[:, :, None] * other[:, None, :]).reshape(len(one), -1)


@factory
def hira(
  rank: int = 32,
  targets: str = '{q}|{v}',
  dropout: float = 0.0,
  name: str = 'hira',
) -> Method:
  """Hadamard high-rank adaptation.

  Args:
    rank: r.
    targets: pattern of sites; every kernel they own is adapted.
    dropout: rate on the input of the update.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range.
  """
  check_rank(rank, dropout)

  def init(key, w):
    fan_in, fan_out = w.shape
    return {'u': uniform(key, (fan_in, rank), fan_in**-0.5), 'v': jnp.zeros((rank, fan_out))}

  def update(t, w):
    return w * (t['u'] @ t['v']).astype(w.dtype)

  def weight(t, w):
    return w + update(t, w)

  def dot(t, x, y, w, key):
    def of_kernel(t):
      return update(t, w())

    return changed_product(of_kernel, t, x, y, w, key, dropout, 0)

  return at(targets, matrix(name, init, weight, dot, requires=required(dropout)))
