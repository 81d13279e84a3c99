"""Bottleneck adapters, one form with a few choices of place.

  h <- h + s (f(x W_down + b) W_up + b')         x [.., d], W_down [d, r], W_up [r, d], f a nonlinearity

- Houlsby et al., 2019 (arXiv 1902.00751; google-research/adapter-bert): x = h, what leaves the
  attention's projection and the second FFN matrix, before the residual. GELU.
- Pfeiffer et al., 2020 (2005.00247; AdapterHub's 'pfeiffer'): one adapter a block, after the FFN.
  With u what enters the FFN's sub-layer and h what the FFN gives: y = u + h + A(u + h) in a block
  that starts with norms, y = LN(u + h + A(LN(u + h))) in one that ends with them, as AdapterHub
  runs it. ReLU.
- parallel, He et al., 2022, "Towards a Unified View" (2110.04366): x is what the FFN reads, h what
  it gives. ReLU, s = 4, or learned. With prefixes in the attention it is MAM: chain(prefix(30),
  parallel(512)).
- AdaptFormer, Chen et al., 2022 (2205.13535; ShoufaChen/AdaptFormer): x = u, the stream between
  attention and MLP before its norm: y = u + MLP(LN u) + s (drop(ReLU(u W_down + b)) W_up + b'). s =
  0.1.

Starts: 'lora', W_down ~ U(-1, 1) / sqrt(d), W_up = 0: exactly the backbone; 'bert', both N(0,
0.02^2); 'houlsby', both normal of std 1e-3, cut at two of them; these two are nearly the backbone.
Biases start at 0.

Deviations. Where a layer drops out what leaves its projection, the adapter of Houlsby comes before
that, not behind it. AdaptFormer needs blocks that start with norms; where norms come last (BERT),
the stream between attention and MLP is what the MLP reads, and `parallel(64, scale=0.1)` adds to it
before the residual. Not mergeable: f is not linear.
"""

import jax
import jax.numpy as jnp

from jpeft.core import Call, Method, Site, at, chain, factory

from ..nn import drop, on_first

ACTIVATIONS = {
  'relu': jax.nn.relu,
  'gelu': jax.nn.gelu,
  'silu': jax.nn.silu,
  'swish': jax.nn.silu,
  'tanh': jnp.tanh,
}


@factory
def houlsby(
  bottleneck: int = 64,
  targets: str = '{o}|{fc2}',
  activation: str = 'gelu',
  init: str = 'houlsby',
  dropout: float = 0.0,
  name: str = 'houlsby',
) -> Method:
  """Adapters behind attention and FFN, before the residual.

  Args:
    bottleneck: r.
    targets: pattern of sites, whose outputs are adapted.
    activation: a name in ACTIVATIONS.
    init: 'lora', 'bert' or 'houlsby'.
    dropout: rate on the bottleneck.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range.
  """
  make, branch = maker(bottleneck, None, activation, init, 1.0, dropout, 'houlsby')

  def apply(t, call, *args, **kwargs):
    return on_first(call(*args, **kwargs), lambda h: h + branch(t, call, h))

  return at(targets, Call(name, apply, lambda key, site, arrays: make(key, site.out, site.out)))


@factory
def pfeiffer(
  reduction: float = 16,
  targets: str = '{block_end}',
  activation: str = 'relu',
  init: str = 'bert',
  dropout: float = 0.0,
  name: str = 'pfeiffer',
) -> Method:
  """One adapter a block, after the FFN.

  Args:
    reduction: d / r.
    targets: pattern of the blocks, or, where blocks end with a norm, of those norms.
    activation: a name in ACTIVATIONS.
    init: 'lora', 'bert' or 'houlsby'.
    dropout: rate on the bottleneck.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, no bottleneck is left.
  """
  make, branch = maker(None, reduction, activation, init, 1.0, dropout, 'pfeiffer')

  def apply(t, call, x, *args, **kwargs):
    if not _is_norm(call.site):
      return on_first(call(x, *args, **kwargs), lambda h: h + branch(t, call, h))
    norm, arrays = call.pure()
    h = norm(arrays, x, *args, **kwargs)  # reads behind the norm, adds before it
    return call(x + branch(t, call, h).astype(x.dtype), *args, **kwargs)

  return at(targets, Call(name, apply, lambda key, site, arrays: make(key, site.out, site.out)))


@factory
def parallel(
  bottleneck: int = 512,
  scale: float | str = 4.0,
  targets: str = '{mlp}',
  activation: str = 'relu',
  init: str = 'lora',
  dropout: float = 0.0,
  name: str = 'parallel',
) -> Method:
  """An adapter beside the FFN.

  Args:
    bottleneck: r.
    scale: s; 'learned' trains it, from 1.
    targets: pattern of sites, beside which an adapter runs.
    activation: a name in ACTIVATIONS.
    init: 'lora', 'bert' or 'houlsby'.
    dropout: rate on the bottleneck.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range.
  """
  make, branch = maker(bottleneck, None, activation, init, scale, dropout, 'parallel')

  def apply(t, call, *args, **kwargs):
    x = next(iter(call.inputs(*args, **kwargs).values()))
    return on_first(call(*args, **kwargs), lambda h: h + branch(t, call, x))

  return at(targets, Call(name, apply, lambda key, site, arrays: make(key, site.input, site.out)))


@factory
def adaptformer(
  bottleneck: int = 64,
  scale: float | str = 0.1,
  dropout: float = 0.1,
  blocks: str = '{block}',
  stream: str = '{norm2}',
  activation: str = 'relu',
  init: str = 'lora',
  name: str = 'adaptformer',
) -> Method:
  """AdaptFormer: an adapter beside norm and MLP.

  Args:
    bottleneck: r; 64, or 8 on VTAB.
    scale: s; 'learned' trains it, from 1.
    dropout: rate on the bottleneck.
    blocks: pattern of the blocks, to whose output the branch is added.
    stream: pattern of the modules, one in each block, whose input is what the branch reads.
    activation: a name in ACTIVATIONS.
    init: 'lora', 'bert' or 'houlsby'.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range; at the call, a `stream` that lies in no block,
      or whose arrays cannot leave the block's own jit or remat.
  """
  make, branch = maker(bottleneck, None, activation, init, scale, dropout, 'adaptformer')

  def record(t, call, *args, **kwargs):
    if call.outer is None:
      raise ValueError(
        f'{name}: {call.site.path!r}, the stream, lies in no block that {blocks!r} names'
      )
    call.outer['u'] = next(iter(call.inputs(*args, **kwargs).values()))
    return call(*args, **kwargs)

  def apply(t, call, *args, **kwargs):
    y = call(*args, **kwargs)
    if 'u' not in call.local:
      raise ValueError(f'{name}: nothing inside {call.site.path!r} is named by stream={stream!r}')
    try:
      return on_first(y, lambda h: h + branch(t, call, call.local['u']))
    except jax.errors.UnexpectedTracerError as error:
      raise ValueError(
        f'{name}: {call.site.path!r} runs its inside under a jit or remat of its own, which the '
        'stream cannot leave: apply that to the whole block, from outside'
      ) from error

  return chain(
    at(blocks, Call(name, apply, lambda key, site, arrays: make(key, site.out, site.out))),
    at(stream, Call(name, record)),
  )


def maker(size, reduction, activation, init, scale, dropout, method: str):
  """(make(key, input, output) -> t, branch(t, call, x) -> what is added)."""
  if size is not None and (int(size) != size or size < 1):
    raise ValueError(f'{method}: bottleneck={size!r} must be a whole number, at least 1')
  if reduction is not None and not reduction > 0:
    raise ValueError(f'{method}: reduction={reduction!r} must be greater than 0')
  for value, choices, what in ((activation, ACTIVATIONS, 'activation'), (init, _STARTS, 'init')):
    if value not in choices:
      raise ValueError(f'{method}: {what}={value!r} must be one of {", ".join(choices)}')
  if isinstance(scale, str) and scale != 'learned':
    raise ValueError(f"{method}: scale={scale!r} must be a number or 'learned'")
  if not 0 <= dropout <= 1:
    raise ValueError(f'{method}: dropout={dropout!r} must lie in [0, 1]')

  def make(key, input, output):
    r = int(output.shape[-1] / reduction) if size is None else size
    if r < 1:
      raise ValueError(
        f'{method}: reduction={reduction!r} leaves nothing of a width of {output.shape[-1]}'
      )
    down, up = _STARTS[init](key, (input.shape[-1], r), (r, output.shape[-1]))
    t = {
      'down': {'kernel': down, 'bias': jnp.zeros(r)},
      'up': {'kernel': up, 'bias': jnp.zeros(output.shape[-1])},
    }
    return {**t, 'scale': jnp.ones(())} if scale == 'learned' else t

  def branch(t, call, x):
    key = call.rng(f'{method} dropout') if dropout else None
    return t.get('scale', scale) * through(t, x, activation, key, dropout)

  return make, branch


def through(
  t, x: jax.Array, activation: str, key: jax.Array | None = None, dropout: float = 0.0
) -> jax.Array:
  """f(x W_down + b) W_up + b', x [.., d]; dropout of the bottleneck where there is a key."""
  h = drop(ACTIVATIONS[activation](x @ t['down']['kernel'] + t['down']['bias']), key, dropout)
  return h @ t['up']['kernel'] + t['up']['bias']


def _lora(key, down, up):
  bound = down[0] ** -0.5
  return jax.random.uniform(key, down, minval=-bound, maxval=bound), jnp.zeros(up)


def _bert(key, down, up):
  keys = jax.random.split(key)
  return 0.02 * jax.random.normal(keys[0], down), 0.02 * jax.random.normal(keys[1], up)


def _houlsby(key, down, up):
  keys = jax.random.split(key)
  return tuple(
    1e-3 * jax.random.truncated_normal(k, -2, 2, s) for k, s in zip(keys, (down, up), strict=True)
  )


_STARTS = {'lora': _lora, 'bert': _bert, 'houlsby': _houlsby}


def _is_norm(site: Site) -> bool:
  """Whether a site owns a norm's vectors, and runs no modules."""
  vectors = [leaf.shape == site.out.shape[-1:] for leaf in site.leaves.values()]
  return (
    bool(vectors) and all(vectors) and not any(p.startswith(f'{site.path}/') for p in site.model)
  )
