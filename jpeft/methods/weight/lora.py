"""LoRA and its kin: a low-rank product beside every frozen matrix.

LoRA: Hu et al., 2022 (arXiv 2106.09685). rsLoRA: Kalajdzievski, 2023 (2312.03732). PiSSA: Meng et
al., 2024 (2404.02948). OLoRA: Buyukakyuz, 2024 (2406.01775). LoftQ, in a file of its own: Li et
al., 2024 (2310.08659). DoRA: Liu et al., 2024 (2402.09353). LoRA-FA: Zhang et al., 2023
(2308.03303).

For a kernel w [fan_in, fan_out] (the papers' W is its transpose), a [fan_in, r] and b [r, fan_out];
x [.., fan_in] is what the layer multiplies with w, y = x w:

  LoRA          w' = w + s a b                   s = alpha / r, or alpha / sqrt(r) for rsLoRA; b
                                                 starts at 0
  LoRA-FA       the same                         a stays as drawn
  PiSSA, OLoRA  w' = w + s (a b - a0 b0)         a0, b0: a and b as they started, from the SVD or
                                                 QR of w
  DoRA          w' = (m / |v|) v, v = w + s a b  |v|: the norms of v's columns, a constant for
                                                 gradients

The product w' is formed by `merge` alone. In training the layer computes y' = y + s (x a) b.

Convolutions, DenseGeneral, Einsum and bare weights are folded into such matrices; of a convolution,
a is one with the kernel's window and strides, b is 1x1. In the file format of Hugging Face peft
lora_A is a.T and lora_B is b.T; a Dense layer that splits heads orders its columns (head, position
in head).

Deviations. PiSSA and OLoRA are published as an edit of the backbone, w - s a0 b0; here the backbone
is never edited, and theta has a0 and b0 as fixed entries: the same function with the same
gradients. |v| is computed from w, a and b without the product a b. Embedding tables [V, d] are
adapted too where a pattern names them: a table is a matrix w with a = 0, b ~ N(0, 1), as peft
starts them, and for DoRA one magnitude a feature, m [d]. They are read off the model as what is
gathered from; the whole table is computed at each step, so that a tied output head sees the same.

Other ranks elsewhere: chain(lora(8, targets='{q}'), lora(16, targets='{v}')). LoRA+ (2402.12354), a
larger learning rate for b, belongs to the optimizer, which multiplies rates by regex over the paths
of theta, here '.*/b': jpeft.optim.optimizer(..., lora_plus=16).
"""

import dataclasses

import jax
import jax.numpy as jnp

from jpeft.core import Leaf, Method, Site, Weight, at, factory, matrix
from jpeft.messages import did_you_mean

from ..check import is_whole, whole
from ..nn import drop
from .loftq import from_residuals


@factory
def lora(
  rank: int = 8,
  alpha: float = 8,
  targets: str = '{q}|{v}',
  dropout: float = 0.0,
  init: str = 'default',
  rslora: bool = False,
  name: str = 'lora',
  iterations: int = 1,
) -> Method:
  """Low-rank adaptation.

  Args:
    rank: r.
    alpha: the product is scaled by alpha / rank.
    targets: pattern of sites; every kernel and embedding table they own is adapted.
    dropout: rate on what enters a; the path through w is not touched.
    init: 'default', a ~ U(-1, 1) / sqrt(fan_in); 'gaussian', a ~ N(0, 1) / rank; 'pissa', the top
      singular triplets of w; 'olora', the first columns of its QR decomposition. The function
      starts unchanged. 'loftq' starts at what w loses in 4 bits, and waits for a pass before the
      kernels are stored so (`prepare`, with `storage=`), see `loftq`.
    rslora: scale by alpha / sqrt(rank) instead.
    name: in theta.
    iterations: of 'loftq': how often a kernel is quantized; beyond 1 what is stored in 4 bits is
      not the kernel itself, see `to_store`.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, a rank that 'pissa' or 'olora'
      cannot cut out of a matrix; in the pass of 'loftq', kernels that are not stored in 4 bits
      after it.
  """
  whole(name, 'iterations', iterations, 1)
  if init == 'loftq':
    method = _low_rank(rank, alpha, targets, dropout, 'default', rslora, name)
    scale = _scale(rank, alpha, rslora, dropout)
    return from_residuals(method, targets, rank, scale, iterations)
  if iterations != 1:
    raise ValueError(f"{name}: iterations={iterations} is of init='loftq', and init is {init!r}")
  return _low_rank(rank, alpha, targets, dropout, init, rslora, name)


@factory
def qlora(
  rank: int = 64,
  alpha: float = 16,
  targets: str = '{linear}',
  dropout: float = 0.0,
  init: str = 'default',
  rslora: bool = False,
  name: str = 'qlora',
  iterations: int = 1,
) -> Method:
  """QLoRA (arXiv 2305.14314): LoRA on every linear layer of a backbone whose kernels are in 4 bits.

  The method is `lora`; what it adds is the backbone. `train` and `plan` store that as NF4 with
  double quantization unless the config says otherwise; elsewhere `jpeft.quantize` does. It starts
  as the 4-bit model, not as the 16-bit one. The authors train with dropout 0.1 (7B) or 0.05, Adam's
  b2 = 0.999, a constant rate and clip_norm 0.3.

  Args: of `lora`.

  Raises:
    ValueError: a hyperparameter outside its range.
  """
  return lora(rank, alpha, targets, dropout, init, rslora, name, iterations)


@factory
def lora_fa(
  rank: int = 8,
  alpha: float = 8,
  targets: str = '{q}|{v}',
  dropout: float = 0.0,
  init: str = 'default',
  rslora: bool = False,
  name: str = 'lora_fa',
) -> Method:
  """LoRA whose a stays as it was drawn: the backward pass keeps x a, r numbers a token, and not x.

  Args: of `lora`; the authors train with `jpeft.optim.lora_fa` before Adam.

  Raises:
    ValueError: a hyperparameter outside its range, or a start that takes the matrix apart.
  """
  if init in (*DECOMPOSITIONS, 'loftq'):
    raise ValueError(
      f"{name}: init={init!r} needs both factors trained; use 'default' or 'gaussian'"
    )
  return _low_rank(rank, alpha, targets, dropout, init, rslora, name, fixed=('a',))


def _low_rank(rank, alpha, targets, dropout, init, rslora, name, fixed=()) -> Method:
  """What `lora` and `lora_fa` share; `fixed` names the factors that are not trained."""
  scale = _scale(rank, alpha, rslora, dropout)
  if init not in STARTS:
    known = [*STARTS, 'loftq']
    hint = did_you_mean(init, known)
    raise ValueError(f'init must be one of {", ".join(known)}, not {init!r}{hint}')
  decomposes = init in DECOMPOSITIONS
  if decomposes:
    fixed = ('a0', 'b0')

  def init_kernel(key, w):
    if decomposes and rank > min(w.shape):
      raise ValueError(
        f'{name}: init={init!r} takes at most rank {min(w.shape)} out of a matrix '
        f'{list(w.shape)}, not {rank}'
      )
    a, b = STARTS[init](key, w.astype(jnp.float32), rank, scale)
    if decomposes:
      return {'a': a, 'b': b, 'a0': a, 'b0': b}
    return {'a': a, 'b': b}

  def weight(theta, w):
    a, b = _factors(theta)
    return w + scale * (a @ b)

  def dot(theta, x, y, w, key):
    a, b = _factors(theta)
    dropped = x.map(lambda v: drop(v, key, dropout))
    return y + scale * ((dropped @ a) @ b)

  kernels = matrix(name, init_kernel, weight, dot, requires=required(dropout), fixed=fixed)
  return at(targets, _with_tables(kernels, rank, weight))


@factory
def dora(
  rank: int = 8,
  alpha: float = 8,
  targets: str = '{q}|{v}',
  dropout: float = 0.0,
  rslora: bool = False,
  name: str = 'dora',
) -> Method:
  """DoRA: a trained magnitude m for every column, and LoRA for its direction.

  With dropout, x~ for what enters a, the layer gives y + (m/|v| - 1) x~ w + (m/|v|) s x~ a b, as
  the official code and peft do: the correction to the frozen output y = x w alone sees dropout.

  Args:
    rank: r.
    alpha: the product is scaled by alpha / rank.
    targets: pattern of sites; every kernel and embedding table they own is adapted.
    dropout: rate on the input of the correction; it costs one more product with w.
    rslora: scale by alpha / sqrt(rank) instead.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range.
  """
  scale = _scale(rank, alpha, rslora, dropout)

  def init_kernel(key, w):
    a, b = _uniform(key, w, rank, scale)
    return {'a': a, 'b': b, 'm': _column_norms(w, a, b, scale)}

  def gain(theta, w):
    """m / |v|, one number a column: [fan_out]."""
    return theta['m'].astype(jnp.float32) / _column_norms(w, theta['a'], theta['b'], scale)

  def weight(theta, w):
    return gain(theta, w) * (w + scale * (theta['a'] @ theta['b']))

  def dot(theta, x, y, w, key):
    factor = gain(theta, w()).astype(y.dtype)
    if key is None or not dropout:
      return factor * (y + scale * ((x @ theta['a']) @ theta['b']))
    x = x.map(lambda v: drop(v, key, dropout))
    low_rank = scale * ((x @ theta['a']) @ theta['b'])
    return y + (factor - 1) * (x @ w()) + factor * low_rank

  # m is exact: rounded to the dtype of y, m / |v| would not be 1 at the start.
  kernels = matrix(name, init_kernel, weight, dot, requires=required(dropout), exact=('m',))

  def magnitude(w, a, b):
    return {'m': _column_norms(w, a, b, scale)}

  return at(targets, _with_tables(kernels, rank, weight, magnitude))


def _uniform(key, w, rank, scale):
  bound = w.shape[0] ** -0.5
  a = jax.random.uniform(key, (w.shape[0], rank), minval=-bound, maxval=bound)
  return a, jnp.zeros((rank, w.shape[1]))


def _gaussian(key, w, rank, scale):
  return jax.random.normal(key, (w.shape[0], rank)) / rank, jnp.zeros((rank, w.shape[1]))


def _pissa(key, w, rank, scale):
  u, s, vt = jnp.linalg.svd(w, full_matrices=False)
  root = jnp.sqrt(s[:rank] / scale)
  return u[:, :rank] * root, root[:, None] * vt[:rank]


def _olora(key, w, rank, scale):
  # Of the transpose, as published: w.T = q r, so that w = r.T q.T.
  q, r = jnp.linalg.qr(w.T)
  return r[:rank].T, q[:, :rank].T


# (key, w, rank, scale) -> (a, b).
STARTS = {'default': _uniform, 'gaussian': _gaussian, 'pissa': _pissa, 'olora': _olora}
# Those whose a b is a part of w, which a0 b0 takes off again.
DECOMPOSITIONS = ('pissa', 'olora')


def required(dropout: float) -> str:
  """What a rule requires of a layer whose input it drops out (`Weight.requires`)."""
  if dropout > 0:
    return 'input in training'
  return 'nothing'


def check_rank(rank: int, dropout: float) -> None:
  """Raises ValueError for a rank or a rate outside its range."""
  if not is_whole(rank, 1):
    raise ValueError(f'rank must be a whole number, at least 1, not {rank!r}')
  if not 0 <= dropout <= 1:
    raise ValueError(f'dropout must lie in [0, 1], not {dropout!r}')


def _scale(rank, alpha, rslora, dropout) -> float:
  """s, the factor of a b, from hyperparameters that are checked first."""
  check_rank(rank, dropout)
  if not alpha > 0:
    raise ValueError(f'alpha must be greater than 0, not {alpha!r}')
  if rslora:
    return alpha / rank**0.5
  return alpha / rank


def _factors(theta):
  """(a, b) of all that is added: of a decomposition [a, a0] and [b; -b0], rank 2 r."""
  if 'a0' not in theta:
    return theta['a'], theta['b']
  a = jnp.concatenate([theta['a'], theta['a0']], 1)
  b = jnp.concatenate([theta['b'], -theta['b0']])
  return a, b


def _column_norms(w, a, b, scale):
  """|v| of v = w + scale a b [fan_out], without forming a b; a constant for gradients."""
  w, a, b = (x.astype(jnp.float32) for x in (w, a, b))
  # Column by column |v|^2 = |w|^2 + 2 s <w, a b> + s^2 |a b|^2.
  inner = jnp.sum((a.T @ w) * b, 0)
  of_product = jnp.sum((a.T @ a @ b) * b, 0)
  square = jnp.sum(w * w, 0) + 2 * scale * inner + scale**2 * of_product
  # A column of zeros (an untrained head) has m = 0 as well and must stay zero.
  return jax.lax.stop_gradient(jnp.sqrt(jnp.maximum(square, jnp.finfo(jnp.float32).tiny)))


def _nothing_more(w, a, b) -> dict:
  return {}


def _with_tables(rule: Weight, rank: int, weight, more=_nothing_more) -> Weight:
  """The rule for kernels, extended to the embedding tables that a site owns.

  Args:
    rule: for kernels.
    rank: of the factors of a table.
    weight: (entries of a table, table) -> the new table, both [V, d].
    more: (table, a, b) -> further entries.
  """

  def init(key, site, arrays):
    theta = rule.init(key, site, arrays)
    # Tables start as in peft, b drawn and a zero; where a is fixed it has to be a that is drawn.
    drawn = 'a' if '*/a' in rule.fixed else 'b'
    for number, (name, leaf) in enumerate(tables(site).items()):
      factors = {'a': jnp.zeros((leaf.fan_in, rank)), 'b': jnp.zeros((rank, leaf.fan_out))}
      own_key = jax.random.fold_in(key, number)
      factors[drawn] = jax.random.normal(own_key, factors[drawn].shape)
      theta[name] = {**factors, **more(leaf.fold(arrays[name]), **factors)}
    return theta

  def apply(theta, site, arrays):
    found = tables(site)
    kernels = {name: t for name, t in theta.items() if name not in found}
    new = rule.apply(kernels, site, arrays)
    for name, leaf in found.items():
      new[name] = leaf.unfold(weight(theta[name], leaf.fold(arrays[name])))
    return new

  return dataclasses.replace(rule, init=init, apply=apply)


def tables(site: Site) -> dict[str, Leaf]:
  """The embedding tables of a site: arrays [V, d] whose rows are gathered."""
  found = {}
  for name, leaf in site.leaves.items():
    if leaf.use == 'gather' and len(leaf.shape) == 2 and len(leaf.ins) == 1:
      found[name] = leaf
  return found
