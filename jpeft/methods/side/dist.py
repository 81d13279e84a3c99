"""DiST: a thin network over time beside a frozen image encoder that sees every other frame.

Qing et al., 2023, "Disentangling Spatial and Temporal Learning for Efficient Image-to-Video
Transfer Learning" (arXiv 2309.07911; alibaba-mmai-research/DiST). A clip has T frames; the encoder
sees every a-th of them, t = T / a. The letters:

  h_l [B, t, 1 + hw, d]  the encoder's states behind block l, the class token first
  X   [B, T, h, w, C]    the map of the network over time
  R   [B, t, 1 + hw, I]  the map of the network that joins the two, zero at first
  M   [B, t, 1 + hw, I]  what that network reads

X begins as a convolution of the pixels over 5 frames and the encoder's patches. Then, for each
block l,

  X <- f(X + Conv_space(f(Conv_time(LN X)))),  M = W_l h_l + R
  X' = X + up(W_c M),  M' = M + [cls; Conv_a(X)]
  R <- FFN(LN M') + TFFN(LN M'),  X <- X'

f QuickGELU, up the repetition of each step a times, Conv_a with kernel and stride a in time, cls
trained rows, TFFN a bottleneck with a convolution over time at each place. Both messages, W_c M and
Conv_a(X), are made of the values before either is added.

F = R + M' of the last block; a query per frame attends to F, one per clip to these, in a few
layers, and with P a matrix

  z = LN(query + W_r mean_t(cls of h_L)) P

is the embedding of the clip, whose cosines with embeddings of texts are the logits (`logits`).
Nothing enters the encoder's backward pass, and z at the start is not the encoder's.

Frames are folded into the batch: the model is called with images [B T, height, width, 3], the
frames of a clip one after the other, and the method gives z [B, out].

Deviations. The published code drops frames behind the patch embedding, this one before it: the
encoder's states are the same. Its mixing in of the image model's own logits is left out.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from jpeft.core import Method, Site, factory

from ..check import require, whole
from ..nn import attend, conv, convolve, dense, layer_norm, linear, remat_if, scales
from .stack import Stack, around

_dense = functools.partial(dense, std=0.02)
_conv = functools.partial(conv, std=0.02)


@factory
def dist(
  frames: int = 16,
  stride: int = 2,
  width: int = 384,
  channels: int = 96,
  pooling: int = 2,
  out: int = 512,
  remat: bool = True,
  blocks: str = '{block}',
  exit: str = '{exit}',
  name: str = 'dist',
) -> Method:
  """DiST (arXiv 2309.07911).

  Args:
    frames: T.
    stride: a; the image encoder sees every a-th frame.
    width: I; heads of the pooling have 64 features.
    channels: C.
    pooling: layers of it: 2 for data about motion, 4 for data about scenes.
    out: width of z.
    remat: recompute each layer in the backward pass.
    blocks: pattern of the blocks.
    exit: pattern of the module that their output goes to.
    name: in theta, at the model itself.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, a model without square images and
      patches and a class token; at the call, images that make no whole clips.
  """
  return _DiST(
    frames=frames,
    stride=stride,
    width=width,
    channels=channels,
    pooling=pooling,
    out=out,
    remat=remat,
    blocks=blocks,
    exit=exit,
    name=name,
  ).method()


@dataclasses.dataclass(frozen=True, eq=False)
class _DiST:
  """The hyperparameters of `dist`, and its rules as methods.

  theta[name][''] is {'stem': the first convolution, 'taps': all W_l, 'layers': the two networks, a
  row for each block (see `init_layers`), 'frame_query', 'clip_query', 'frame' and 'clip': the
  layers in which they attend, 'position': of the frames there, 'residual': W_r, 'norm': LN,
  'project': P}.
  """

  frames: int
  stride: int
  width: int
  channels: int
  pooling: int
  out: int
  remat: bool
  blocks: str
  exit: str
  name: str

  def __post_init__(self):
    for name in ('frames', 'stride', 'width', 'channels', 'pooling', 'out'):
      whole('dist', name, getattr(self, name), 1)
    rule = f'does not divide frames={self.frames}'
    require(self.frames % self.stride == 0, 'dist', 'stride', self.stride, rule)
    rule = f'is no multiple of its {self.heads} heads'
    require(self.width % self.heads == 0, 'dist', 'width', self.width, rule)

  def method(self) -> Method:
    """Reads the states of the encoder's blocks, and makes the output of the model."""
    return around(self.name, self.blocks, self.exit, self.init, self.apply)

  @property
  def steps(self) -> int:
    """t, how many frames of a clip the encoder sees."""
    return self.frames // self.stride

  @property
  def heads(self) -> int:
    """Of the pooling."""
    return max(1, self.width // 64)

  def side(self, net: Stack) -> int:
    """h = w, of the patches behind the class token."""
    patches = net.stack[0].input.shape[1] - 1
    side = math.isqrt(max(patches, 0))
    if patches < 1 or side**2 != patches:
      raise ValueError(
        f'{self.name}: {patches + 1} tokens are no class token and a square of patches'
      )
    return side

  def patch(self, net: Stack, site: Site) -> int:
    """Height and width of a patch, in pixels."""
    side = self.side(net)
    shape = site.input.shape[1:]
    if len(shape) != 3 or shape[0] != shape[1] or shape[0] % side:
      raise ValueError(f'{self.name}: images of {shape} do not fall into {side} x {side} patches')
    return shape[0] // side

  # Parameters

  def init(self, net: Stack, key, site: Site, arrays) -> dict:
    """The parameters at the model itself."""
    patch = self.patch(net, site)
    keys = iter(jax.random.split(key, 32))
    width = self.width
    return {
      'stem': _conv(next(keys), (5, patch, patch), 3, self.channels),
      'taps': _dense(next(keys), net.width, width, net.depth),
      'layers': self.init_layers(keys, net.depth),
      'frame_query': _rows(next(keys), width),
      'clip_query': _rows(next(keys), width),
      'frame': self.init_pooling(keys),
      'clip': self.init_pooling(keys),
      'position': _rows(next(keys), self.pooling, self.steps, width),
      'residual': _dense(next(keys), net.width, width),
      'norm': scales(width),
      'project': width**-0.5 * jax.random.normal(next(keys), (width, self.out)),
    }

  def init_layers(self, keys, depth: int) -> dict:
    """Both networks beside all blocks, stacked: {'norm', 'time', 'space'} make X, 'to_time' is W_c,
    'from_time' Conv_a, 'cls' the rows for the class token, the rest FFN and TFFN.
    """
    width = self.width
    channels = self.channels
    narrow = width // 4
    return {
      'norm': scales(channels, depth),
      'time': _conv(next(keys), (3, 1, 1), channels, channels, depth),
      'space': _conv(next(keys), (1, 3, 3), channels, channels, depth),
      'to_time': _dense(next(keys), width, channels, depth),
      'from_time': _conv(next(keys), (self.stride, 1, 1), channels, width, depth),
      'cls': _rows(next(keys), depth, self.steps, 1, width),
      'ffn_norm': scales(width, depth),
      'ffn1': _dense(next(keys), width, width, depth),
      'ffn2': _dense(next(keys), width, width, depth),
      'tffn_norm': scales(width, depth),
      'tffn1': _dense(next(keys), width, narrow, depth),
      'tffn2': _conv(next(keys), (3, 1, 1), narrow, narrow, depth),
      'tffn3': _dense(next(keys), narrow, width, depth),
    }

  def init_pooling(self, keys) -> dict:
    """The layers in which one query attends, stacked."""
    width = self.width
    layers = self.pooling
    return {
      'norm': scales(width, layers),
      'mlp_norm': scales(width, layers),
      **{name: _dense(next(keys), width, width, layers) for name in 'qkvo'},
      'up': _dense(next(keys), width, 4 * width, layers),
      'down': _dense(next(keys), 4 * width, width, layers),
    }

  # The forward pass

  def apply(self, t, net: Stack, run, call, images, *args, **kwargs):
    """z [B, out] of images [B T, height, width, 3]."""
    if len(images) % self.frames:
      raise ValueError(
        f'{self.name}: {len(images)} images are no whole clips of {self.frames} frames'
      )
    video = rearrange(images, '(b t) ... -> b t ...', t=self.frames)
    seen = rearrange(video[:, :: self.stride], 'b t ... -> (b t) ...')
    taps, last = run(seen, *args, **kwargs)

    def project(h, layer):  # [B t, 1 + hw, d] to [B, t, 1 + hw, I]
      return self.unfold(linear(layer, h))

    h = net.each(project, taps, last, range(1, net.depth + 1), t['taps'])
    x = stem(t['stem'], video.astype(last.dtype))
    side = self.side(net)
    r = jnp.zeros((len(video), self.steps, 1 + side**2, self.width), last.dtype)
    # Inside a scan XLA cannot merge the second computation with the first: no barrier is needed.
    step = remat_if(self.remat, self.step, prevent_cse=False)
    _, r, m = net.run(step, (x, r, r), {'h': h, 'layer': t['layers']})

    query = self.pooled(t, rearrange(r + m, 'b t n i -> (b t) n i'))
    # The class token takes a second way to z, beside that through F.
    cls = self.unfold(last[:, 0]).mean(1)  # [B, d]
    return layer_norm(t['norm'], query + linear(t['residual'], cls)) @ t['project']

  def unfold(self, x: jax.Array) -> jax.Array:
    """The frames that the encoder sees on an axis of their own: [B t, ...] to [B, t, ...]."""
    return rearrange(x, '(b t) ... -> b t ...', t=self.steps)

  def step(self, maps: tuple[jax.Array, jax.Array, jax.Array], row: Any):
    """(X, R, M') after the layers beside a block; M' serves only F, behind the last block.

    Args:
      maps: (X, R, M') before them, M' unused.
      row: {'h': W_l h_l [B, t, 1 + hw, I], 'layer': the parameters beside block l}.
    """
    x, r, _ = maps
    t = row['layer']
    x = temporal(t, x)
    m = row['h'] + r  # R comes in here alone: the next one is made of M' without it

    height, width = x.shape[2:4]
    back = linear(t['to_time'], m[:, :, 1:])
    back = rearrange(back, 'b t (h w) c -> b t h w c', h=height, w=width)
    back = jnp.repeat(back, self.stride, 1)  # [B, T, h, w, C]

    forth = convolve(t['from_time'], x, (self.stride, 1, 1), padding=0)
    forth = rearrange(forth, 'b t h w i -> b t (h w) i')
    cls = jnp.broadcast_to(t['cls'], (len(x), *t['cls'].shape))  # [B, t, 1, I]
    m = m + jnp.concatenate([cls, forth], 2)
    return x + back, ffn(t, m) + temporal_ffn(t, m), m

  def pooled(self, t, tokens: jax.Array) -> jax.Array:
    """The clip's query [B, I], after it has attended to the frames' and these to F.

    Args:
      t: all parameters.
      tokens: F [B t, 1 + hw, I].
    """

    def layer(queries, t):
      frame, clip = queries
      frame = attended(t['frame'], frame, tokens, self.heads)
      frames = self.unfold(frame[:, 0]) + t['position']  # [B, t, I]
      return (frame, attended(t['clip'], clip, frames, self.heads)), None

    images = len(tokens)
    frame = jnp.broadcast_to(t['frame_query'], (images, 1, self.width))
    clip = jnp.broadcast_to(t['clip_query'], (images // self.steps, 1, self.width))
    layers = {name: t[name] for name in ('frame', 'clip', 'position')}
    (_, clip), _ = jax.lax.scan(layer, (frame, clip), layers)
    return clip[:, 0]


def logits(z: jax.Array, texts: jax.Array, scale: float) -> jax.Array:
  """exp(scale) times the cosines of embeddings of clips [B, D] and texts [C, D]: [B, C]."""

  def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

  return jnp.exp(scale) * unit(z) @ unit(texts).T


def stem(t, video: jax.Array) -> jax.Array:
  """X of the pixels: [B, T, height, width, 3] to [B, T, h, w, C]."""
  patch = t['kernel'].shape[1]
  return convolve(t, video, (1, patch, patch), padding=(2, 0, 0))


def temporal(t, x: jax.Array) -> jax.Array:
  """f(X + Conv_space(f(Conv_time(LN X)))) of X [B, T, h, w, C]."""
  y = quick_gelu(convolve(t['time'], layer_norm(t['norm'], x), padding=(1, 0, 0)))
  return quick_gelu(x + convolve(t['space'], y, padding=(0, 1, 1)))


def quick_gelu(x: jax.Array) -> jax.Array:
  """f."""
  return x * jax.nn.sigmoid(1.702 * x)


def ffn(t, m: jax.Array) -> jax.Array:
  """FFN(LN M'): [B, t, N, I] to the same."""
  y = linear(t['ffn1'], layer_norm(t['ffn_norm'], m))
  return linear(t['ffn2'], quick_gelu(y))


def temporal_ffn(t, m: jax.Array) -> jax.Array:
  """TFFN(LN M'): [B, t, N, I] to the same."""
  y = linear(t['tffn1'], layer_norm(t['tffn_norm'], m))
  y = convolve(t['tffn2'], y[:, :, :, None], padding=(1, 0, 0))[:, :, :, 0]
  return linear(t['tffn3'], quick_gelu(y))


def attended(t, query: jax.Array, tokens: jax.Array, heads: int) -> jax.Array:
  """A query [B, 1, I] that has attended to tokens [B, N, I], and an MLP of it.

  One norm serves queries and tokens, as published.
  """
  y = attend(t, layer_norm(t['norm'], query), layer_norm(t['norm'], tokens), heads)
  query = query + y
  y = quick_gelu(linear(t['up'], layer_norm(t['mlp_norm'], query)))
  return query + linear(t['down'], y)


def _rows(key: jax.Array, *shape: int) -> jax.Array:
  """Trained tokens or positions, N(0, 0.02^2)."""
  return 0.02 * jax.random.normal(key, shape)
