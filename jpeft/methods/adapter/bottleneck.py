"""Bottleneck adapters, one form with a few choices of place.

  h <- h + s (f(x W_down + b) W_up + b')         x, h [.., d], W_down [d, r], W_up [r, d]

f is a nonlinearity, s a number. What the methods differ in is which x is read and which h is added
to. "FFN" is the MLP of a block.

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

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core import Bound, Call, Method, Site, at, chain, factory

from ..arguments import first_array
from ..check import require, whole, within
from ..nn import drop

ACTIVATIONS = {
  'relu': jax.nn.relu,
  'gelu': jax.nn.gelu,  # by tanh
  'gelu_exact': functools.partial(jax.nn.gelu, approximate=False),
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
  adapter = Adapter('houlsby', activation, init, dropout, bottleneck=bottleneck)

  def init_site(key, site, arrays):
    return adapter.init(key, site.out, site.out)

  def apply(theta, call, *args, **kwargs):
    out = call(*args, **kwargs)
    return call.site.map_stream(out, lambda h: h + adapter.branch(theta, call, h))

  return at(targets, Call(name, apply, init_site))


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
  adapter = Adapter('pfeiffer', activation, init, dropout, reduction=reduction)

  def init_site(key, site, arrays):
    return adapter.init(key, site.out, site.out)

  def apply(theta, call, x, *args, **kwargs):
    if not _is_norm(call.site):
      out = call(x, *args, **kwargs)
      return call.site.map_stream(out, lambda h: h + adapter.branch(theta, call, h))
    # In a block that ends with this norm the adapter reads behind the norm and adds before it, so
    # the norm runs twice: here as a pure function, below as the module that other rules see.
    norm, arrays = call.pure()
    normed = norm(arrays, x, *args, **kwargs)
    added = adapter.branch(theta, call, normed)
    return call(x + added.astype(x.dtype), *args, **kwargs)

  return at(targets, Call(name, apply, init_site))


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
  adapter = Adapter('parallel', activation, init, dropout, scale, bottleneck)

  def init_site(key, site, arrays):
    return adapter.init(key, site.input, site.out)

  def apply(theta, call, *args, **kwargs):
    x = first_array(call, args, kwargs)
    out = call(*args, **kwargs)
    return call.site.map_stream(out, lambda h: h + adapter.branch(theta, call, x))

  return at(targets, Call(name, apply, init_site))


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
  adapter = Adapter('adaptformer', activation, init, dropout, scale, bottleneck)
  return beside_norm_and_mlp(name, blocks, stream, adapter)


def beside_norm_and_mlp(
  name: str, blocks: str, stream: str, adapter: Any, exact: tuple[str, ...] = ()
) -> Method:
  """The two rules of `adaptformer`, with any adapter.

  Args:
    name: in theta.
    blocks: pattern of the blocks, to whose output the branch is added.
    stream: pattern of the modules whose input is what the branch reads.
    adapter: has `init` and `branch`, as `Adapter`.
    exact: entries of its theta that `branch` gets as stored.
  """

  def init_block(key, site, arrays):
    return adapter.init(key, site.out, site.out)

  def record(theta, call, *args, **kwargs):
    """At the norm: hands its input u to the block around it."""
    if call.outer is None:
      raise ValueError(
        f'{name}: {call.site.path!r}, the stream, lies in no block that {blocks!r} names'
      )
    call.outer['u'] = first_array(call, args, kwargs)
    return call(*args, **kwargs)

  def apply(theta, call, *args, **kwargs):
    """At the block: adds the branch of u."""
    out = call(*args, **kwargs)
    if 'u' not in call.local:
      raise ValueError(f'{name}: nothing inside {call.site.path!r} is named by stream={stream!r}')
    try:
      return call.site.map_stream(out, lambda h: h + adapter.branch(theta, call, call.local['u']))
    except jax.errors.UnexpectedTracerError as error:
      raise ValueError(
        f'{name}: {call.site.path!r} runs its inside under a jit or remat of its own, which the '
        'stream cannot leave: apply that to the whole block, from outside'
      ) from error

  block = Call(name, apply, init_block, exact=exact)
  return chain(at(blocks, block), at(stream, Call(name, record)))


@dataclasses.dataclass(frozen=True)
class Adapter:
  """The adapter of one method, s (f(x W_down + b) W_up + b').

  Attributes:
    method: the factory's name, for errors.
    activation: f, a name in ACTIVATIONS.
    start: how W_down and W_up start, a name in STARTS.
    dropout: rate on the bottleneck.
    scale: s; 'learned' trains it, from 1.
    bottleneck: r; None where `reduction` gives it.
    reduction: d / r, d the width of the output.
  """

  method: str
  activation: str
  start: str
  dropout: float
  scale: float | str = 1.0
  bottleneck: int | None = None
  reduction: float | None = None

  def __post_init__(self):
    method = self.method
    if self.bottleneck is not None:
      whole(method, 'bottleneck', self.bottleneck, 1)
    if self.reduction is not None:
      require(self.reduction > 0, method, 'reduction', self.reduction, 'must be greater than 0')
    _one_of(method, 'activation', self.activation, ACTIVATIONS)
    _one_of(method, 'init', self.start, STARTS)
    if isinstance(self.scale, str):
      is_learned = self.scale == 'learned'
      require(is_learned, method, 'scale', self.scale, "must be a number or 'learned'")
    within(method, 'dropout', self.dropout, 0, 1)

  def init(self, key, input, output) -> dict:
    """theta of one adapter, from the shapes of what it reads and of what it adds to."""
    fan_in = input.shape[-1]
    fan_out = output.shape[-1]
    width = self._width(fan_out)
    down, up = STARTS[self.start](key, (fan_in, width), (width, fan_out))
    theta = {
      'down': {'kernel': down, 'bias': jnp.zeros(width)},
      'up': {'kernel': up, 'bias': jnp.zeros(fan_out)},
    }
    if self.scale == 'learned':
      theta['scale'] = jnp.ones(())
    return theta

  def _width(self, fan_out: int) -> int:
    """r."""
    if self.bottleneck is not None:
      return self.bottleneck
    width = int(fan_out / self.reduction)
    rule = f'leaves nothing of a width of {fan_out}'
    require(width >= 1, self.method, 'reduction', self.reduction, rule)
    return width

  def branch(self, theta, call: Bound, x: jax.Array) -> jax.Array:
    """What is added to the stream; in training dropout falls on the bottleneck.

    Args:
      theta: of one adapter.
      call: the call that the adapter belongs to, which has the random key.
      x: [.., d].
    """
    key = None
    if self.dropout:
      key = call.rng(f'{self.method} dropout')
    scale = theta.get('scale', self.scale)
    return scale * self.apply(theta, x, key)

  def apply(self, theta, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """f(x W_down + b) W_up + b', without s; dropout of the bottleneck where there is a key."""
    down = theta['down']
    up = theta['up']
    hidden = ACTIVATIONS[self.activation](x @ down['kernel'] + down['bias'])  # [.., r]
    hidden = drop(hidden, key, self.dropout)
    return hidden @ up['kernel'] + up['bias']


def _one_of(method: str, name: str, value: str, table: dict) -> None:
  require(value in table, method, name, value, f'must be one of {", ".join(table)}')


def _lora(key, down, up):
  bound = down[0] ** -0.5
  return jax.random.uniform(key, down, minval=-bound, maxval=bound), jnp.zeros(up)


def _bert(key, down, up):
  key_down, key_up = jax.random.split(key)
  return 0.02 * jax.random.normal(key_down, down), 0.02 * jax.random.normal(key_up, up)


def _houlsby(key, down, up):
  key_down, key_up = jax.random.split(key)
  cut_normal = lambda key, shape: 1e-3 * jax.random.truncated_normal(key, -2, 2, shape)
  return cut_normal(key_down, down), cut_normal(key_up, up)


# (key, shape of W_down, shape of W_up) -> (W_down, W_up).
STARTS = {'lora': _lora, 'bert': _bert, 'houlsby': _houlsby}


def _is_norm(site: Site) -> bool:
  """Whether a site is a norm: it owns vectors of the stream's width alone, and runs no modules."""
  if not site.leaves:
    return False
  width = site.out.shape[-1:]
  if any(leaf.shape != width for leaf in site.leaves.values()):
    return False
  return not any(path.startswith(f'{site.path}/') for path in site.model)
