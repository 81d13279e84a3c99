"""R2-Tuning: one small block walks a frozen image encoder's last layers, from the deepest up, for
moments in videos.

Liu et al., 2024, "R2-Tuning: Efficient Image-to-Video Transfer Learning for Video Temporal
Grounding" (arXiv 2404.00801; yeliudev/R2-Tuning). The last k states of the image encoder, frame by
frame, and of a text encoder are mapped to width D: V_i [B T, P, D], Q_i [B, L, D]. From the
deepest, i = k - 1, to i = 0, with weights shared by all

  A = softmax((W_q Q_i)(W_v V_i)' / sqrt D) over patches,  o = max over words of (A V_i + Q_i)
  e = cls(V_i) + tanh(s_i) o,  e <- s(g_i) e + (1 - s(g_i)) last  (i < k - 1),  last <- Decoder(e, Q_i)

the decoder attending to the words, then along time, then an MLP. `last` [B, T, D] feeds a pyramid
of halved rates, a score and two boundaries at each of its points. s = g = 0 at first: no word
counts, layers mix in equal parts.

Frames are folded into the batch: the model is called with images [B T, height, width, 3], frames of
a video one after the other, and `tuned.apply` takes beside them

  query       [B, k, L, d_text], the last k states of the text encoder, the deepest last, frozen
  query_mask  [B, L], True for words (optional: all), and frame_mask [B, T] likewise

and gives {'last': [B, T, D], 'cls': [B, k, T, D] the class tokens of V, 'query': [B, k, D] the
words of Q pooled by weights that are trained, 'score': [B, T_s, 1] and 'boundary': [B, T_s, 2] a
level}. Nothing enters the encoders' backward pass. Losses, targets and the choice of moments belong
to the task: `points` gives the places and ranges that targets need; moments are compared with
query[:, 0]. The words' mask acts in the decoder and in the pooled query alone, as published.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jpeft.core import Method, factory

from ..nn import dense, drop, layer_norm, linear, scales
from .stack import around


@factory
def r2_tuning(
  frames: int,
  states: int = 4,
  width: int = 256,
  heads: int = 8,
  query_width: int = 512,
  strides: Sequence[int] = (1, 2, 4, 8),
  dropout: float = 0.5,
  drop_path: float = 0.1,
  times: bool = True,
  blocks: str = '{block}',
  exit: str = '{exit}',
  name: str = 'r2_tuning',
) -> Method:
  """R2-Tuning (arXiv 2404.00801).

  Args:
    frames: T, of a video.
    states: k, of embeddings and outputs of blocks, the last ones.
    width: D.
    heads: of the decoder.
    query_width: d_text.
    strides: of the pyramid's levels, powers of 2.
    dropout: rate in the maps to width D.
    drop_path: how often a branch of the decoder is left out of a video.
    times: append t / T and (t + 1) / T to the states of frame t.
    blocks: pattern of the image encoder's blocks.
    exit: pattern of the module that their output goes to.
    name: in theta, at the model itself.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, fewer states than are asked for; at
      the call, images that make no whole videos or a query of another shape.
  """
  for value, what in ((frames, 'frames'), (states, 'states'), (width, 'width'), (heads, 'heads')):
    if int(value) != value or value < 1:
      raise ValueError(f'r2_tuning: {what}={value!r} must be a whole number, at least 1')
  if width % heads or width % 2:
    raise ValueError(f'r2_tuning: width={width} must be even, and a multiple of heads={heads}')
  if not strides or any(s < 1 or s & (s - 1) for s in strides):
    raise ValueError(f'r2_tuning: strides={tuple(strides)} must be powers of 2')
  for value, what in ((dropout, 'dropout'), (drop_path, 'drop_path')):
    if not 0 <= value < 1:
      raise ValueError(f'r2_tuning: {what}={value!r} must be at least 0 and below 1')
  halvings = [s.bit_length() - 1 for s in strides]

  def init(net, key, site, arrays):
    if states > net.depth + 1:
      raise ValueError(f'{name}: states={states}, and {net.depth} blocks have {net.depth + 1}')
    k = iter(jax.random.split(key, 64))

    def glorot(fan_in, fan_out):
      bound = math.sqrt(6 / (fan_in + fan_out))
      return {
        'kernel': jax.random.uniform(next(k), (fan_in, fan_out), minval=-bound, maxval=bound),
        'bias': jnp.zeros(fan_out),
      }

    def conv(size, fan_out):
      p = dense(next(k), size * width, fan_out)
      return {**p, 'kernel': p['kernel'].reshape(size, width, fan_out)}

    def maps(d):
      return {
        'norm1': scales(d),
        'fc1': dense(next(k), d, width),
        'norm2': scales(width),
        'fc2': dense(next(k), width, width),
      }

    attention = lambda: {n: glorot(width, width) for n in ('q', 'k', 'v', 'o')}
    kaiming = lambda fan_in, fan_out: dense(next(k), fan_in, fan_out, std=math.sqrt(2 / fan_in))
    t = {
      'video': maps(net.width + 2 * times),
      'query': maps(query_width),
      'w_q': glorot(width, width),
      'w_v': glorot(width, width),
      's': jnp.zeros(states),
      'decoder': {
        'cross': attention(),
        'self': attention(),
        'fc1': kaiming(width, 4 * width),
        'fc2': kaiming(4 * width, width),
        **{f'norm{i}': scales(width) for i in (1, 2, 3)},
      },
      'pyramid': {
        str(s): {str(i): {'conv': conv(2, width), 'norm': scales(width)} for i in range(n)}
        for s, n in zip(strides, halvings, strict=True)
        if n
      },
      'pool': dense(next(k), width, 1)['kernel'],
      'level': jnp.ones(len(strides)),
      'score': {'hidden': conv(3, width), 'out': conv(3, 1)},
      'boundary': {'hidden': conv(3, width), 'out': conv(3, 2)},
    }
    return t | ({'g': jnp.zeros(states - 1)} if states > 1 else {})

  def apply(t, net, run, call, images, *args, query, query_mask=None, frame_mask=None, **kwargs):
    if len(images) % frames:
      raise ValueError(f'{name}: {len(images)} images are no whole videos of {frames} frames')
    batch = len(images) // frames
    if query.ndim != 4 or (query.shape[0], query.shape[1], query.shape[3]) != (
      batch,
      states,
      query_width,
    ):
      raise ValueError(
        f'{name}: query is {list(query.shape)}, and {batch} videos need [{batch}, {states}, words, '
        f'{query_width}]'
      )
    taps, last = run(images, *args, **kwargs)
    at = [net.depth + 1 - states + i for i in range(states)]
    wide = [last if i == net.depth else net.recorded(taps, 'x', i) for i in at]
    query = jax.lax.stop_gradient(query).astype(last.dtype)
    query_mask = (
      jnp.ones(query.shape[::2][:2], bool) if query_mask is None else query_mask.astype(bool)
    )
    frame_mask = jnp.ones((batch, frames), bool) if frame_mask is None else frame_mask.astype(bool)
    key = call.rng('r2_tuning dropout') if dropout or drop_path else None
    keys = iter([None] * 7 * states if key is None else jax.random.split(key, 7 * states))
    found, steps = None, []
    for i in reversed(range(states)):
      v = _mapped(
        t['video'], _timed(wide[i], frames) if times else wide[i], (next(keys), next(keys)), dropout
      )
      q = _mapped(t['query'], query[:, i], (next(keys), next(keys)), dropout)
      e = v[:, 0] + jnp.tanh(t['s'][i]) * pooled(t, jnp.repeat(q, frames, 0), v)
      e = e.reshape(batch, frames, width)
      if found is not None:
        gate = jax.nn.sigmoid(t['g'][i])
        e = gate * e + (1 - gate) * found
      weight = jax.nn.softmax(jnp.where(query_mask[..., None], q @ t['pool'], -1e9), 1)
      steps.append((v[:, 0].reshape(e.shape), (weight * q).sum(1)))
      paths = [next(keys) for _ in range(3)]
      found = _decoded(t['decoder'], e, q, frame_mask, query_mask, heads, paths, drop_path)
    cls, pool = (jnp.stack(x[::-1], 1) for x in zip(*steps, strict=True))
    out = {'last': found, 'cls': cls, 'query': pool, 'score': [], 'boundary': []}
    for n, stride in enumerate(strides):
      x = jax.nn.relu(found) if stride == 1 else found
      for i in range(halvings[n]):
        p = t['pyramid'][str(stride)][str(i)]
        x = jax.nn.relu(layer_norm(p['norm'], _conv(p['conv'], x, 2, 'VALID')))
      out['score'].append(_head(t['score'], x))
      out['boundary'].append(t['level'][n] * jnp.exp(_head(t['boundary'], x)))
    return out

  return around(name, blocks, exit, init, apply, takes=('query', 'query_mask', 'frame_mask'))


def points(
  frames: int, strides: Sequence[int] = (1, 2, 4, 8)
) -> list[dict[str, jax.Array | tuple[float, float]]]:
  """Of each level of the pyramid: where its points lie, 'at' [T_s], in frames, and the 'range' of
  boundaries, in frames, that are theirs to tell."""
  before = [0, *strides[1:]]
  after = [*strides[1:], math.inf]
  return [
    {'at': s * jnp.arange(frames // s), 'range': (before[n], after[n])}
    for n, s in enumerate(strides)
  ]


def pooled(t, q: jax.Array, v: jax.Array) -> jax.Array:
  """o [B T, D] of words q [B T, L, D] and patches v [B T, P, D]."""
  logits = linear(t['w_q'], q) @ linear(t['w_v'], v).swapaxes(-1, -2) / math.sqrt(v.shape[-1])
  return (jax.nn.softmax(logits.astype(jnp.float32), -1).astype(v.dtype) @ v + q).max(1)


def _timed(x, frames: int):
  """Every token with its frame's begin and end, in units of the video."""
  at = jnp.tile(jnp.arange(frames), len(x) // frames)[:, None, None] / frames
  ends = jnp.concatenate([at, at + 1 / frames], -1).astype(x.dtype)
  return jnp.concatenate([x, jnp.broadcast_to(ends, (*x.shape[:2], 2))], -1)


def _mapped(p, x, keys, rate: float):
  x = jax.nn.relu(linear(p['fc1'], drop(layer_norm(p['norm1'], x), keys[0], rate)))
  return linear(p['fc2'], drop(layer_norm(p['norm2'], x), keys[1], rate))


def _decoded(p, e, words, frame_mask, query_mask, heads: int, keys, rate: float):
  """e [B, T, D] that has attended to the words and along time; norms behind each branch."""

  def branch(n, x, y):
    if keys[n - 1] is not None and rate:
      stays = jax.random.bernoulli(keys[n - 1], 1 - rate, (len(y), 1, 1))
      y = y * (stays / (1 - rate)).astype(y.dtype)
    return layer_norm(p[f'norm{n}'], x + y)

  place = _places(e.shape[1], e.shape[2]).astype(e.dtype)
  e = branch(1, e, _attended(p['cross'], e + place, words, words, query_mask, heads))
  e = branch(2, e, _attended(p['self'], e + place, e + place, e, frame_mask, heads))
  return branch(3, e, linear(p['fc2'], jax.nn.relu(linear(p['fc1'], e))))


def _attended(p, q, k, v, mask, heads: int):
  split = lambda x: x.reshape(*x.shape[:-1], heads, -1)
  q, k, v = (split(linear(p[n], x)) for n, x in (('q', q), ('k', k), ('v', v)))
  return linear(
    p['o'],
    jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None]).reshape(*q.shape[:2], -1),
  )


def _places(length: int, width: int) -> jax.Array:
  """Sinusoidal positions [length, width]: sines of the even features, cosines of the odd ones."""
  angle = jnp.arange(length)[:, None] / 10000 ** (jnp.arange(0, width, 2) / width)
  return jnp.stack([jnp.sin(angle), jnp.cos(angle)], -1).reshape(length, width)


def _conv(p, x, stride: int = 1, padding: str = 'SAME'):
  return (
    jax.lax.conv_general_dilated(
      x, p['kernel'], (stride,), padding, dimension_numbers=('NWC', 'WIO', 'NWC')
    )
    + p['bias']
  )


def _head(p, x):
  return _conv(p['out'], jax.nn.relu(_conv(p['hidden'], x)))
