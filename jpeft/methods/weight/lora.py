"""LoRA and its kin: a low-rank product beside every frozen matrix.

LoRA: Hu et al., 2022 (arXiv 2106.09685). rsLoRA: Kalajdzievski, 2023 (2312.03732). PiSSA: Meng et
al., 2024 (2404.02948). OLoRA: Buyukakyuz, 2024 (2406.01775). DoRA: Liu et al., 2024 (2402.09353).
LoRA-FA: Zhang et al., 2023 (2308.03303).

For a kernel w [fan_in, fan_out] (the papers' W is its transpose), a [fan_in, r] and b [r, fan_out]:

  LoRA          w' = w + s a b                   s = alpha / r, or alpha / sqrt(r) for rsLoRA; b = 0 at first
  LoRA-FA       the same; a stays as drawn
  PiSSA, OLoRA  w' = w + s (a b - a0 b0)         a0, b0: a and b as they started, from the SVD or QR of w
  DoRA          w' = (m / |v|) v, v = w + s a b  |v|: the norms of v's columns, a constant for gradients

Convolutions, DenseGeneral, Einsum and bare weights are folded into such matrices; of a convolution,
a is one with the kernel's window and strides, b is 1x1. In the file format of Hugging Face peft
lora_A is a.T and lora_B is b.T; a Dense layer that splits heads orders its columns (head, position
in head).

Deviations. PiSSA and OLoRA are published as an edit of the backbone, w - s a0 b0; here the backbone
is never edited, and the fixed entries a0, b0 ride in theta: the same function with the same
gradients. |v| is computed from w, a and b without the product a b. Embedding tables [V, d] are
adapted too where a pattern names them: table + s a b with a = 0, b ~ N(0, 1), as peft starts them,
read off the model as what is gathered from; the whole table is computed at each step, so that a
tied output head sees the same table.

Other ranks elsewhere: chain(lora(8, targets='{q}'), lora(16, targets='{v}')). LoRA+ (2402.12354), a
larger learning rate for b, belongs to the optimizer, which multiplies rates by regex over the paths
of theta, here '.*/b': jpeft.optim.optimizer(..., lora_plus=16).
"""

import dataclasses
import difflib

import jax
import jax.numpy as jnp

from jpeft.core import Method, Weight, at, factory, matrix

from ..nn import drop


@factory
def lora(
  rank: int = 8,
  alpha: float = 8,
  targets: str = '{q}|{v}',
  dropout: float = 0.0,
  init: str = 'default',
  rslora: bool = False,
  name: str = 'lora',
) -> Method:
  """Low-rank adaptation.

  Args:
    rank: r.
    alpha: the product is scaled by alpha / rank.
    targets: pattern of sites; every kernel and embedding table they own is adapted.
    dropout: rate on what enters a; the path through w is not touched.
    init: 'default', a ~ U(-1, 1) / sqrt(fan_in); 'gaussian', a ~ N(0, 1) / rank; 'pissa', the top
      singular triplets of w; 'olora', the first columns of its QR decomposition. The function
      starts unchanged.
    rslora: scale by alpha / sqrt(rank) instead.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, a rank that 'pissa' or 'olora'
      cannot cut out of a matrix.
  """
  return _lora(rank, alpha, targets, dropout, init, rslora, name, ())


@factory
def qlora(
  rank: int = 64,
  alpha: float = 16,
  targets: str = '{linear}',
  dropout: float = 0.0,
  init: str = 'default',
  rslora: bool = False,
  name: str = 'qlora',
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
  return lora(rank, alpha, targets, dropout, init, rslora, name)


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
  """LoRA whose a stays as it was drawn: the backward pass keeps x a, r numbers a token, in the
  place of x.

  Args: of `lora`; the authors train with `jpeft.optim.lora_fa` before Adam.

  Raises:
    ValueError: a hyperparameter outside its range, or a start that takes the matrix apart.
  """
  if init in ('pissa', 'olora'):
    raise ValueError(
      f"{name}: init={init!r} needs both factors trained; use 'default' or 'gaussian'"
    )
  return _lora(rank, alpha, targets, dropout, init, rslora, name, ('a',))


def _lora(rank, alpha, targets, dropout, init, rslora, name, fixed) -> Method:
  scale = _scale(rank, alpha, rslora, dropout)
  if init not in STARTS:
    near = difflib.get_close_matches(str(init), STARTS, 1)
    hint = f'; did you mean {near[0]!r}?' if near else ''
    raise ValueError(f'init must be one of {", ".join(STARTS)}, not {init!r}{hint}')
  start = STARTS[init]
  decomposes = start in (_pissa, _olora)

  def begin(key, w):
    if decomposes and rank > min(w.shape):
      raise ValueError(
        f'{name}: init={init!r} takes at most rank {min(w.shape)} out of a matrix '
        f'{list(w.shape)}, not {rank}'
      )
    a, b = start(key, w.astype(jnp.float32), rank, scale)
    return {'a': a, 'b': b, **({'a0': a, 'b0': b} if decomposes else {})}

  def weight(t, w):
    a, b = _factors(t)
    return w + scale * (a @ b)

  def dot(t, x, y, w, key):
    a, b = _factors(t)
    return y + scale * ((x.map(lambda v: drop(v, key, dropout)) @ a) @ b)

  fixed = ('a0', 'b0') if decomposes else fixed
  kernels = matrix(
    name,
    begin,
    weight,
    dot,
    requires='input in training' if dropout > 0 else 'nothing',
    fixed=fixed,
  )
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
    targets: pattern of sites; every kernel they own is adapted.
    dropout: rate on the input of the correction; it costs one more product with w.
    rslora: scale by alpha / sqrt(rank) instead.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range.
  """
  scale = _scale(rank, alpha, rslora, dropout)

  def begin(key, w):
    a, b = _uniform(key, w, rank, scale)
    return {'a': a, 'b': b, 'm': _norms(w, a, b, scale)}

  def gain(t, w):
    return t['m'].astype(jnp.float32) / _norms(w, t['a'], t['b'], scale)

  def weight(t, w):
    return gain(t, w) * (w + scale * (t['a'] @ t['b']))

  def dot(t, x, y, w, key):
    g = gain(t, w()).astype(y.dtype)
    if key is None or not dropout:
      return g * (y + scale * ((x @ t['a']) @ t['b']))
    x = x.map(lambda v: drop(v, key, dropout))
    return y + (g - 1) * (x @ w()) + g * scale * ((x @ t['a']) @ t['b'])

  return at(
    targets,
    matrix(
      name,
      begin,
      weight,
      dot,
      requires='input in training' if dropout > 0 else 'nothing',
      exact=('m',),
    ),
  )


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
  q, r = jnp.linalg.qr(w.T)
  return r[:rank].T, q[:, :rank].T


STARTS = {'default': _uniform, 'gaussian': _gaussian, 'pissa': _pissa, 'olora': _olora}


def _scale(rank, alpha, rslora, dropout) -> float:
  """The factor of a b, from hyperparameters that are checked first."""
  check(rank, dropout)
  if not alpha > 0:
    raise ValueError(f'alpha must be greater than 0, not {alpha!r}')
  return alpha / (rank**0.5 if rslora else rank)


def check(rank: int, dropout: float) -> None:
  """Raises ValueError for a rank or a rate outside its range."""
  if int(rank) != rank or rank < 1:
    raise ValueError(f'rank must be a whole number, at least 1, not {rank!r}')
  if not 0 <= dropout <= 1:
    raise ValueError(f'dropout must lie in [0, 1], not {dropout!r}')


def _factors(t):
  """(a, b) of all that is added, the start of a decomposition taken off."""
  if 'a0' not in t:
    return t['a'], t['b']
  return jnp.concatenate([t['a'], t['a0']], 1), jnp.concatenate([t['b'], -t['b0']])


def _norms(w, a, b, scale):
  """The norm of each column of w + scale a b, without that matrix; a constant for gradients."""
  w, a, b = (x.astype(jnp.float32) for x in (w, a, b))
  cross = jnp.sum((a.T @ w) * b, 0)
  square = jnp.sum(w * w, 0) + 2 * scale * cross + scale**2 * jnp.sum((a.T @ a @ b) * b, 0)
  # A column of zeros (an untrained head) has m = 0 as well and must stay zero.
  return jax.lax.stop_gradient(jnp.sqrt(jnp.maximum(square, jnp.finfo(jnp.float32).tiny)))


def _with_tables(rule: Weight, rank: int, weight) -> Weight:
  """The rule, for embedding tables too: arrays [V, d] whose rows are gathered."""

  def tables(site):
    return {
      name: leaf
      for name, leaf in site.leaves.items()
      if leaf.use == 'gather' and len(leaf.shape) == 2 and len(leaf.ins) == 1
    }

  def init(key, site, arrays):
    theta = rule.init(key, site, arrays)
    for i, (name, leaf) in enumerate(tables(site).items()):
      a, b = jnp.zeros((leaf.fan_in, rank)), jnp.zeros((rank, leaf.fan_out))
      drawn = lambda x, i=i: jax.random.normal(jax.random.fold_in(key, i), x.shape)
      theta[name] = {'a': drawn(a), 'b': b} if 'a' in rule.fixed else {'a': a, 'b': drawn(b)}
    return theta

  def apply(theta, site, arrays):
    found = tables(site)
    new = rule.apply({name: t for name, t in theta.items() if name not in found}, site, arrays)
    return new | {
      name: leaf.unfold(weight(theta[name], leaf.fold(arrays[name])))
      for name, leaf in found.items()
    }

  return dataclasses.replace(rule, init=init, apply=apply)
