"""DiST: a thin network over time beside a frozen image encoder that sees every other frame.

Qing et al., 2023, "Disentangling Spatial and Temporal Learning for Efficient Image-to-Video
Transfer Learning" (arXiv 2309.07911; alibaba-mmai-research/DiST). A clip has T frames; the encoder
sees every a-th of them, t = T / a, and gives h_l [B, t, 1 + hw, d] behind block l. With X [B, T, h,
w, C] and R [B, t, 1 + hw, I], for each block

  X <- f(X + Conv_space(f(Conv_time(LN X)))),  M = W_l h_l + R,
  X' = X + up(W_c M),  M' = M + [cls; Conv_a(X)],  R <- FFN(LN M') + TFFN(LN M'),  X <- X',

f QuickGELU, up the repetition of each step a times, Conv_a with kernel and stride a in time, TFFN a
bottleneck with a convolution over time at each place. X begins as a convolution of the pixels over
5 frames and the encoder's patches. F = R + M' of the last block; a query per frame attends to F,
one per clip to these, in a few layers, and

  z = LN(query + W_r mean_t(cls of h_L)) P

is the embedding of the clip, whose cosines with embeddings of texts are the logits (`logits`).
Nothing enters the encoder's backward pass, and z at the start is not the encoder's.

Frames are folded into the batch: the model is called with images [B T, height, width, 3], the
frames of a clip one after the other, and the method gives z [B, out]. The published code drops
frames behind the patch embedding, this one before it: the encoder's states are the same. Its mixing
in of the image model's own logits is left out.
"""

import functools
import math

import jax
import jax.numpy as jnp

from jpeft.core import Method, factory

from ..nn import dense, layer_norm, linear, scales
from .stack import around


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
  for value, what in (
    (frames, 'frames'),
    (stride, 'stride'),
    (width, 'width'),
    (channels, 'channels'),
    (pooling, 'pooling'),
    (out, 'out'),
  ):
    if int(value) != value or value < 1:
      raise ValueError(f'dist: {what}={value!r} must be a whole number, at least 1')
  if frames % stride:
    raise ValueError(f'dist: stride={stride} does not divide frames={frames}')
  steps, heads = frames // stride, max(1, width // 64)
  if width % heads:
    raise ValueError(f'dist: width={width} is no multiple of its {heads} heads')

  def init(net, key, site, arrays):
    depth, d, side = net.depth, net.width, _side(net, name)
    height, across = site.input.shape[1:3]
    if len(site.input.shape) != 4 or height != across or height % side:
      raise ValueError(
        f'{name}: images of {site.input.shape[1:]} do not fall into {side} x {side} patches'
      )
    patch, fresh = height // side, functools.partial(dense, std=0.02)
    k = iter(jax.random.split(key, 32))
    narrow = width // 4

    def conv(fan_in, fan_out, *size, lead=(depth,)):
      p = fresh(next(k), math.prod(size) * fan_in, fan_out, *lead)
      return {**p, 'kernel': p['kernel'].reshape(*lead, *size, fan_in, fan_out)}

    def attention():
      return {
        'norm': scales(width, pooling),
        'mlp_norm': scales(width, pooling),
        **{n: fresh(next(k), width, width, pooling) for n in ('q', 'k', 'v', 'o')},
        'up': fresh(next(k), width, 4 * width, pooling),
        'down': fresh(next(k), 4 * width, width, pooling),
      }

    token = lambda *shape: 0.02 * jax.random.normal(next(k), (*shape, width))
    return {
      'stem': conv(3, channels, 5, patch, patch, lead=()),
      'taps': fresh(next(k), d, width, depth),
      'layers': {
        'norm': scales(channels, depth),
        'time': conv(channels, channels, 3, 1, 1),
        'space': conv(channels, channels, 1, 3, 3),
        'to_time': fresh(next(k), width, channels, depth),
        'from_time': conv(channels, width, stride, 1, 1),
        'cls': token(depth, steps, 1),
        'ffn_norm': scales(width, depth),
        'ffn1': fresh(next(k), width, width, depth),
        'ffn2': fresh(next(k), width, width, depth),
        'tffn_norm': scales(width, depth),
        'tffn1': fresh(next(k), width, narrow, depth),
        'tffn2': conv(narrow, narrow, 3, 1, 1),
        'tffn3': fresh(next(k), narrow, width, depth),
      },
      'frame_query': token(),
      'clip_query': token(),
      'frame': attention(),
      'clip': attention(),
      'position': token(pooling, steps),
      'residual': fresh(next(k), d, width),
      'norm': scales(width),
      'project': width**-0.5 * jax.random.normal(next(k), (width, out)),
    }

  def apply(t, net, run, call, images, *args, **kwargs):
    if len(images) % frames:
      raise ValueError(f'{name}: {len(images)} images are no whole clips of {frames} frames')
    video = images.reshape(-1, frames, *images.shape[1:])
    clips, side = len(video), _side(net, name)
    taps, last = run(video[:, ::stride].reshape(-1, *images.shape[1:]), *args, **kwargs)
    project = lambda h, p: linear(p, h).reshape(clips, steps, -1, width)
    taps = net.each(project, taps, last, range(1, net.depth + 1), t['taps'])

    def step(s, row):
      (x, r, _), p = s, row['p']
      x, m = temporal(p, x), row['h'] + r
      back = linear(p['to_time'], m[:, :, 1:]).reshape(clips, steps, side, side, channels)
      seen = _conv(p['from_time'], x, stride=stride).reshape(clips, steps, -1, width)
      cls = jnp.broadcast_to(p['cls'], (clips, *p['cls'].shape))
      m = m + jnp.concatenate([cls, seen], 2)
      return x + jnp.repeat(back, stride, 1), _ffn(p, m) + _tffn(p, m), m

    first = (
      stem(t['stem'], video.astype(last.dtype)),
      *[jnp.zeros((clips, steps, 1 + side**2, width), last.dtype)] * 2,
    )
    _, r, m = net.run(
      jax.checkpoint(step, prevent_cse=False) if remat else step,
      first,
      {'h': taps, 'p': t['layers']},
    )
    query = _pooled(t, (r + m).reshape(clips * steps, -1, width), clips)
    cls = last[:, 0].reshape(clips, steps, -1).mean(1)
    return layer_norm(t['norm'], query + linear(t['residual'], cls)) @ t['project']

  def _pooled(t, tokens, clips):
    def layer(s, p):
      frame, clip = s
      frame = _attended(p['frame'], frame, tokens, heads)
      held = frame.reshape(clips, steps, width) + p['position']
      return (frame, _attended(p['clip'], clip, held, heads)), None

    start = lambda query, n: jnp.broadcast_to(query, (n, 1, width))
    s = start(t['frame_query'], clips * steps), start(t['clip_query'], clips)
    (_, clip), _ = jax.lax.scan(layer, s, {n: t[n] for n in ('frame', 'clip', 'position')})
    return clip[:, 0]

  return around(name, blocks, exit, init, apply)


def logits(z: jax.Array, texts: jax.Array, scale: float) -> jax.Array:
  """exp(scale) times the cosines of embeddings of clips [B, D] and texts [C, D]: [B, C]."""
  unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
  return jnp.exp(scale) * unit(z) @ unit(texts).T


def stem(p, video: jax.Array) -> jax.Array:
  """X of the pixels: [B, T, height, width, 3] to [B, T, h, w, C]."""
  patch = p['kernel'].shape[1]
  return (
    jax.lax.conv_general_dilated(
      video,
      p['kernel'],
      (1, patch, patch),
      [(2, 2), (0, 0), (0, 0)],
      dimension_numbers=('NDHWC', 'DHWIO', 'NDHWC'),
    )
    + p['bias']
  )


def temporal(p, x: jax.Array) -> jax.Array:
  """One layer of the network over time, X [B, T, h, w, C]."""
  y = _quick_gelu(_conv(p['time'], layer_norm(p['norm'], x), (1, 0, 0)))
  return _quick_gelu(x + _conv(p['space'], y, (0, 1, 1)))


def _conv(p, x, pad=(0, 0, 0), stride: int = 1):
  return (
    jax.lax.conv_general_dilated(
      x,
      p['kernel'],
      (stride, 1, 1),
      [(n, n) for n in pad],
      dimension_numbers=('NDHWC', 'DHWIO', 'NDHWC'),
    )
    + p['bias']
  )


def _quick_gelu(x):
  return x * jax.nn.sigmoid(1.702 * x)


def _ffn(p, m):
  return linear(p['ffn2'], _quick_gelu(linear(p['ffn1'], layer_norm(p['ffn_norm'], m))))


def _tffn(p, m):
  y = linear(p['tffn1'], layer_norm(p['tffn_norm'], m))
  y = _conv(p['tffn2'], y[:, :, :, None], (1, 0, 0))[:, :, :, 0]
  return linear(p['tffn3'], _quick_gelu(y))


def _attended(p, query, tokens, heads: int):
  """A query [B, 1, I] that has attended to tokens [B, N, I] (one norm serves both), and an MLP of
  it.
  """
  split = lambda x: x.reshape(*x.shape[:-1], heads, -1)
  q, held = layer_norm(p['norm'], query), layer_norm(p['norm'], tokens)
  y = jax.nn.dot_product_attention(
    split(linear(p['q'], q)), split(linear(p['k'], held)), split(linear(p['v'], held))
  )
  query = query + linear(p['o'], y.reshape(query.shape))
  return query + linear(p['down'], _quick_gelu(linear(p['up'], layer_norm(p['mlp_norm'], query))))


def _side(net, name: str) -> int:
  """h = w, of the patches behind the class token."""
  tokens = net.stack[0].input.shape[1] - 1
  if tokens < 1 or math.isqrt(tokens) ** 2 != tokens:
    raise ValueError(f'{name}: {tokens + 1} tokens are no class token and a square of patches')
  return math.isqrt(tokens)
