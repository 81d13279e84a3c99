"""PaCA: some rows of every kernel are trained in place, and nothing stands beside it.

Woo et al., 2025, "Partial Connection Adaptation" (arXiv 2503.01905); official code
WooSunghyeon/paca. For a kernel w [fan_in, fan_out] (the paper's W is its transpose, so that its
columns are rows here) and r chosen rows I, with s = alpha / r:

  w'_I = w_I + s d        w' = w elsewhere        d [r, fan_out], 0 at first
  y' = x w + s x_I d      dd = s x_I^T dy

The backward pass keeps x_I, r numbers a token, and not x.

Many tokens are multiplied by a copy of w with its rows changed, which the backward pass makes
again: x w' is then the only product of the layer. Where tokens are few, copies of a large kernel
move more than that saves; and a kernel in 4 bits would have to be decoded for them. There s x_I d
is added to x w.

I is drawn for each kernel from the random key of theta; `choose` takes the rows of the largest or
of the smallest norms instead, the alternatives in the official code. I is in theta, and no
optimizer sees it.

Deviations. The official code trains p = w_I / s. Here theta has d = p - w_I / s: the same function
with the same gradients, whose weight decay pulls towards the backbone and not towards 0; and it
starts bit for bit as the backbone. Of a kernel in 4 bits (QPaCA) w_I are its decoded rows, so that
the method starts as the 4-bit model, and the 4-bit product stays as it is. Convolutions are
adapted too: their chosen rows are channels at places of the window.
"""

import math

import jax
import jax.numpy as jnp

from jpeft.core import Method, Operand, at, factory, matrix

from ..check import choice, require, whole
from . import changed_rows


@factory
def paca(
  rank: int = 8,
  alpha: float = 16,
  targets: str = '{linear}',
  choose: str = 'random',
  name: str = 'paca',
) -> Method:
  """Partial connection adaptation.

  Args:
    rank: r, rows of each kernel that are trained; at most the smallest fan_in.
    alpha: the change of the rows is scaled by alpha / rank.
    targets: pattern of sites; every kernel they own is adapted.
    choose: 'random' rows, or those of the 'largest' or 'smallest' norms.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, a kernel of fewer rows than `rank`.
  """
  whole('paca', 'rank', rank, 1)
  require(alpha > 0, 'paca', 'alpha', alpha, 'must be greater than 0')
  choice('paca', 'choose', choose, _CHOICES)
  scale = alpha / rank

  def init(key, w):
    fan_in, fan_out = w.shape
    require(rank <= fan_in, name, 'rank', rank, f'rows are to be chosen from a kernel {[*w.shape]}')
    rows = jnp.sort(_CHOICES[choose](key, w)[:rank])
    return {'rows': rows.astype(jnp.int32), 'd': jnp.zeros((rank, fan_out))}

  def weight(t, w):
    return w.at[t['rows']].add((scale * t['d']).astype(w.dtype))

  def dot(t, x, y, w, key):
    if w.plain and _copies(y.shape, x.fan_in):
      return _product(x, w(), t['rows'], scale * t['d'])
    return y + scale * (x.columns(t['rows']) @ t['d'])

  return at(targets, matrix(name, init, weight, dot))


def _copies(shape: tuple[int, ...], fan_in: int) -> bool:
  """Whether a changed copy of the kernel moves fewer numbers than products beside it.

  Args:
    shape: of the output, [..., fan_out].
    fan_in: of the kernel.
  """
  *batch, fan_out = shape
  read_and_written = 2 * fan_in * fan_out
  x_read_and_y_changed = math.prod(batch) * (fan_in + 2 * fan_out)
  return read_and_written <= x_read_and_y_changed


def _product(x: Operand, w, rows, change) -> jax.Array:
  """x w' with change [r, fan_out] added to some rows of w."""

  def changed(w, change, state):
    change = change.astype(w.dtype)
    return w.at[state['inputs']].add(change, indices_are_sorted=True, unique_indices=True)

  def gradient(columns, g, state):
    return jnp.dot(columns.T, g, preferred_element_type=jnp.float32)

  return changed_rows.product(x, w, change, {'inputs': rows}, changed, gradient)


# Orders of the rows of a kernel, the first to be chosen in front.


def _random(key, w):
  return jax.random.permutation(key, w.shape[0])


def _smallest(key, w):
  return jnp.argsort(jnp.linalg.norm(w.astype(jnp.float32), axis=1))


def _largest(key, w):
  return _smallest(key, w)[::-1]


_CHOICES = {'random': _random, 'largest': _largest, 'smallest': _smallest}
