"""SHERL: states of the frozen backbone are merged, and the merged one goes through the last frozen
block.

Diao et al., 2024, "SHERL: Synthesizing High Accuracy and Efficient Memory for Resource-Limited
Transfer Learning" (arXiv 2407.07523; Paranioar/SHERL). The letters:

  h_1 .. h_n [B, N, d]  the embeddings and the outputs of some blocks before the last one
  u_i [B, N, m]         the projection of h_i; u_n is that of the deepest state
  R_i [B, N]            the redundancy of u_i: how much the others point the same way
  v   [B, N, m]         the merged state
  x   [B, N, d]         what the last block reads

Every token is merged alone. L1_i divides by the sum over i, cos is the cosine, s the sigmoid, and i
and j count the shallow states, below n:

  u_i = Down_i h_i,  R_i = sum_j ReLU(cos(u_i, u_j))
  a_i = L1_i(ReLU(w . (u_i * u_n)) / R_i),  v = sum_i a_i u_i + u_n
  x = Up ReLU(v) + tanh(g / T) h_last,  out = Norm(LastBlock(x))

h_last is the backbone's own input of the last block. g starts at 0, so that at first the last block
sees the merged state alone. Norm is new and trained, where the backbone has a norm behind its
blocks. The forms of Down and Up:

  down='gated'  r = ReLU(W1 h),  Down h = (W2 r + r) * s(W3 r)
  down='norm'   Down h = LN(W1 h)
  up='linear'   Up x = W x
  up='norm'     Up x = LN(W x)

T5 uses 'gated' and 'linear', the text tower of VSE infinity 'norm' and 'norm'.

What crosses the backbone. The backward pass runs through one frozen block, the last, with respect
to its input; the states before it are constants. What it keeps: that block's inside, the states
(inputs of the W1), and n projections of width m, whatever the depth. The block runs twice, once as
the backbone's own.

In an encoder-decoder no block of the encoder runs again: its merged state (of all its blocks, with
h_last the output of the last) is a second memory, which the last decoder block alone attends to
when it runs again on the decoder's x. The earlier ones read the frozen encoder.

Deviations. The applications on feature maps are left out, and CLIP4Clip's, which runs no block
again.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jpeft.core import PARTIAL_REENTRY, Call, Method, Site, at, chain, factory

from ..check import at_least, choice, within
from ..nn import dense, drop, layer_norm, linear, put_stream, remat_if, rms_norm, scales
from .stack import Stack, called, contexts_of, record

DOWNS = ('gated', 'norm')
UPS = ('linear', 'norm')


@factory
def sherl(
  reduction: int = 8,
  width: int | None = None,
  down: str = 'gated',
  up: str = 'linear',
  layers: Sequence[int] | None = None,
  temperature: float = 0.1,
  dropout: float = 0.0,
  std: float = 0.01,
  remat: bool = False,
  blocks: str = '{block}',
  exit: str = '{exit}',
  name: str = 'sherl',
) -> Method:
  """SHERL (arXiv 2407.07523).

  Args:
    reduction: d / m.
    width: m itself.
    down: 'gated' or 'norm', see above.
    up: 'linear' or 'norm', see above.
    layers: the layers whose outputs are merged; None for all. The last layer counts only in an
      encoder that feeds a decoder. The embeddings are always merged.
    temperature: T.
    dropout: rate on what is merged, after Up.
    std: of the initial weights of 'gated' and 'linear'.
    remat: recompute the projections in the backward pass.
    blocks: pattern of the backbone's blocks.
    exit: pattern of the module whose output is the last hidden state, one for each stack.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, a model without one stream of
      tokens, or whose only block is the last.
  """
  if layers is not None:
    layers = tuple(layers)
  return _SHERL(
    reduction=reduction,
    width=width,
    down=down,
    up=up,
    layers=layers,
    temperature=temperature,
    dropout=dropout,
    std=std,
    remat=remat,
    blocks=blocks,
    exit=exit,
    name=name,
  ).method()


@dataclasses.dataclass(frozen=True, eq=False)
class _SHERL:
  """The hyperparameters of `sherl`, and its rules as methods.

  theta[name][exit] is {'down': all Down_i, stacked, 'score': w and its bias, 'gamma': g, 'up': W,
  'up_norm': LN of the form 'norm', 'norm': Norm}, those that the model and the forms need. 'down'
  is {'1', '2', '3'} of the form 'gated', {'1', 'norm'} of the form 'norm'.
  """

  reduction: int
  width: int | None
  down: str
  up: str
  layers: tuple[int, ...] | None
  temperature: float
  dropout: float
  std: float
  remat: bool
  blocks: str
  exit: str
  name: str

  def __post_init__(self):
    choice('sherl', 'down', self.down, DOWNS)
    choice('sherl', 'up', self.up, UPS)
    at_least('sherl', 'reduction', self.reduction, 1)
    if self.width is not None:
      at_least('sherl', 'width', self.width, 1)
    within('sherl', 'dropout', self.dropout, 0, 1)

  def method(self) -> Method:
    """The blocks record their inputs; each exit merges them, the last one runs a block again."""
    side = Call(self.name, self.apply, self.init, taps=True, memory=PARTIAL_REENTRY)
    return chain(
      record(self.name, self.blocks, beside=self.given_again, memory=PARTIAL_REENTRY),
      at(self.exit, side),
    )

  def stack(self, site: Site) -> Stack:
    """The blocks before an exit."""
    net = Stack(site, self.blocks, self.exit)
    net.check_tokens(self.name)
    return net

  def merged_states(self, net: Stack) -> tuple[int, ...]:
    """Which states of a stack are merged, ascending: 0, the embeddings, and outputs of blocks."""
    top = net.depth
    if net.is_last:
      top -= 1  # the last block reads the merged state
    chosen = [i for i in net.chosen(self.layers) if i < top]
    if not chosen:
      raise ValueError(
        f'{self.name}: no block before the last of {net.depth} is left to merge before '
        f'{net.site.path!r}'
      )
    return (0, *(i + 1 for i in chosen))

  def given_again(self, site: Site) -> list[str]:
    """The inputs that a block is given where it runs again, and need not record.

    They are the encoder's states: the last block reads those of the side network instead.
    """
    return contexts_of(site, called(site, self.exit))

  def init(self, key, site, arrays):
    net = self.stack(site)
    states = len(self.merged_states(net))
    width = net.width
    narrow = self.width or width // self.reduction
    keys = jax.random.split(key, 5)
    t = {
      'down': self.init_down(keys[:3], width, narrow, states),
      'score': dense(keys[3], narrow, 1),
      'gamma': jnp.zeros(()),
    }
    if self.up == 'linear':
      t['up'] = dense(keys[4], narrow, width, std=self.std)
    else:
      t['up'] = dense(keys[4], narrow, width)
      t['up_norm'] = scales(width)
    if not net.wraps_blocks:  # blocks that end with a norm need none after the last
      if 'bias' in site.leaves:
        t['norm'] = scales(width)
      else:  # the backbone's is an RMSNorm
        t['norm'] = {'scale': jnp.ones(width)}
    return t

  def init_down(self, keys, width: int, narrow: int, states: int) -> dict:
    """The parameters of Down_i of all states, stacked."""
    if self.down == 'norm':
      return {'1': dense(keys[0], width, narrow, states), 'norm': scales(narrow, states)}
    return {
      '1': dense(keys[0], width, narrow, states, std=self.std),
      '2': dense(keys[1], narrow, narrow, states, std=self.std),
      '3': dense(keys[2], narrow, narrow, states, std=self.std),
    }

  def apply(self, t, call, x, *args, **kwargs):
    """The output of the last exit is made of x; an encoder's stays the backbone's."""
    net = self.stack(call.site)
    y = call(x, *args, **kwargs)
    taps = call.taps()
    last = net.last(x, call.site.stream(y))
    side = self.merge(t, net, call, taps, last)
    if not net.is_last:
      call.tap(side=norm(t, side))
      return y
    # Here alone a gradient runs through the backbone. No stop_gradient may stand behind it: all of
    # theta but Norm reaches the loss by no other way.
    side = self.run_last_block(net, call, taps, side.astype(x.dtype))
    return put_stream(call.site, y, norm(t, side))

  def merge(self, t, net: Stack, call, taps, last: jax.Array) -> jax.Array:
    """x [B, N, d], the merged state in the width of the backbone.

    Args:
      t: theta of the exit.
      net: the blocks before it.
      call: of the exit.
      taps: what the blocks recorded.
      last: the last state of the stack [B, N, d].
    """
    project = remat_if(self.remat, self.project)
    u = net.each(project, taps, last, self.merged_states(net), t['down'])
    if isinstance(u, list):
      u = jnp.stack(u)  # [n, B, N, m]
    v = linear(t['up'], jax.nn.relu(merged(t['score'], u)))
    if self.up == 'norm':
      v = layer_norm(t['up_norm'], v)
    if self.dropout:
      v = drop(v, call.rng('sherl dropout'), self.dropout)
    h_last = last
    if net.is_last:
      h_last = net.recorded(taps, 'x', net.depth - 1)
    return v + jnp.tanh(t['gamma'] / self.temperature) * h_last

  def project(self, h: jax.Array, t) -> jax.Array:
    """u_i = Down_i h_i: [B, N, d] to [B, N, m]."""
    if self.down == 'norm':
      return layer_norm(t['norm'], linear(t['1'], h))
    r = jax.nn.relu(linear(t['1'], h))
    return (linear(t['2'], r) + r) * jax.nn.sigmoid(linear(t['3'], r))

  def run_last_block(self, net: Stack, call, taps, x: jax.Array) -> jax.Array:
    """LastBlock(x) [B, N, d]; a decoder's attends to what the encoder's exit recorded as `side`."""
    deepest = net.depth - 1
    block, index = net.layer(deepest)
    states = {}
    if net.encoder is not None:
      states = dict.fromkeys(net.contexts, taps[net.encoder.path]['side'])
    # Masks and position biases, as the backbone's own run had them.
    args, kwargs = net.beside(taps, deepest).with_stream(x, **states)
    run, arrays = call.layer(block, index)
    return block.stream(run(arrays, *args, **kwargs))


def merged(t, u: jax.Array) -> jax.Array:
  """v [B, N, m] of the projections u [n, B, N, m], the deepest last; t is the linear map w."""
  # In float32: of a bfloat16 stream, cosines and shares would have 8 bits.
  shallow = u[:-1].astype(jnp.float32)
  deepest = u[-1].astype(jnp.float32)
  square = jnp.sum(jnp.square(shallow), -1, keepdims=True)
  direction = shallow * jax.lax.rsqrt(jnp.maximum(square, 1e-12))
  cosines = jnp.einsum('ibnm,jbnm->ijbn', direction, direction)
  # R_i [n - 1, B, N]: at least 1, the cosine of u_i with itself, but where u_i is zero.
  redundancy = jax.nn.relu(cosines).sum(1)
  score = linear(t, u[:-1] * u[-1])[..., 0].astype(jnp.float32)
  score = jax.nn.relu(score) / jnp.maximum(redundancy, 1e-6)
  # Where no score is positive, all shares are zero and v is u_n.
  share = score / jnp.maximum(score.sum(0), 1e-6)
  return (jnp.einsum('ibn,ibnm->bnm', share, shallow) + deepest).astype(u.dtype)


def norm(t, x: jax.Array) -> jax.Array:
  """Norm(x), a LayerNorm or an RMSNorm; x where blocks end with a norm. t is all of theta."""
  if 'norm' not in t:
    return x
  if 'shift' in t['norm']:
    return layer_norm(t['norm'], x)
  return rms_norm(t['norm'], x)
