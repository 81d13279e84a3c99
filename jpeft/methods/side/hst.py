"""Hierarchical side-tuning: a four-stage pyramid beside a plain ViT, for classification and dense
prediction.

Lin et al., 2023 (arXiv 2310.05393; AFeng-x/HST). Every backbone block i gets a trained token e_i,
which takes part in its attention and leaves with what it became, G_i; V_i are the patches behind
the block. Stage j, of width C_j and at stride 4 2^j, owns a quarter of the blocks, and runs for
each of them

  g = LN_i(T_j G_i),  f = resize(T_j V_i) to the stage's grid,  K = [g; mean of f]
  x <- x + Attention(LN(x), K, K),  x <- x + f,  x <- x + MLP(LN(x)).

T_j is shared by the stage. The stem (3x3 and 2x2 convolutions of stride 2) reads the images, 3x3
convolutions of stride 2 stand between stages, a LayerNorm ends each. The maps behind it are what
dense heads read; the classifier reads the mean of the last. The scales and shifts of the backbone's
block norms are trained as well.

What crosses the backbone: everything. e_i and the norms sit inside it, so that the backward pass
runs through all blocks. HST saves parameters and optimizer state, not activations; use remat on the
backbone for those.

`output='segmentation'` is a semantic FPN on the maps (Kirillov et al., 2019, arXiv 1901.02446): 1x1
lateral maps, each level added to the finer one, a 3x3 convolution a level, all resized to stride 4
and added, 1x1 to the classes.

Deviations. Batch norm in stem and head would carry running statistics: LayerNorm over channels
stands there, with as many parameters. The patches go through T_j before they are resized, the same
numbers at a fraction of the memory. e_i stands behind the model's special tokens, not before them,
which no attention tells. The dense head is ours.
"""

import functools
import math

import jax
import jax.numpy as jnp

from jpeft.core import FULL_CROSSING, Call, Method, Site, at, chain, factory

from ..layers import layer_norm, linear, put_first, scales
from ..prompt.vpt import enter, lead_of, remove_tokens
from ..subset.tune import tune
from .stack import Stack

OUTPUTS = ('logits', 'maps', 'segmentation')


@factory
def hst(
  widths: tuple[int, ...] = (32, 48, 64, 72),
  heads: tuple[int, ...] = (2, 4, 8, 12),
  depths: tuple[int, ...] | None = None,
  output: str = 'logits',
  classes: int | None = None,
  fpn_width: int = 64,
  drop_path: float = 0.0,
  remat: bool = False,
  blocks: str = '{block}',
  norms: str = '{norm}',
  root: str = '',
  name: str = 'hst',
) -> Method:
  """Hierarchical side-tuning (arXiv 2310.05393).

  Args:
    widths: C_j of the four stages.
    heads: of each stage's attention.
    depths: how many blocks each stage owns; None for a quarter each.
    output: what the model returns: 'logits' [B, C], 'maps', a tuple of [B, H / s, W / s, C_j] at
      strides s of 4, 8, 16 and 32, or 'segmentation', logits [B, H / 4, W / 4, classes].
    classes: of 'segmentation'.
    fpn_width: channels of its pyramid.
    drop_path: rate at which a side branch is left out for an example.
    remat: recompute side blocks in the backward pass.
    blocks: pattern of the backbone's blocks.
    norms: pattern of the norms that are trained.
    root: pattern of the module that is called with images and whose output is replaced.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, a model that reads no images [B, H,
      W, channels] or whose patches are no grid.
  """
  if output not in OUTPUTS:
    raise ValueError(f'hst: output={output!r} is none of {", ".join(map(repr, OUTPUTS))}')
  if (output == 'segmentation') != (classes is not None):
    raise ValueError(f"hst: classes={classes} goes with output='segmentation', not with {output!r}")
  if len(widths) != 4 or len(heads) != 4 or any(c % h for c, h in zip(widths, heads, strict=True)):
    raise ValueError(
      f'hst: four widths, each divided by its heads, are needed; got {widths} and {heads}'
    )
  if not 0 <= drop_path < 1:
    raise ValueError(f'hst: drop_path={drop_path} must be at least 0 and below 1')

  @functools.lru_cache(maxsize=64)
  def stages(site: Site) -> tuple[Stack, list[list[int]], tuple[int, int]]:
    """(the backbone's blocks, those of each stage, rows and columns of patches)."""
    images = site.input.shape if site.input is not None else ()
    if len(images) != 4:
      raise ValueError(
        f'{name}: a pyramid is built on images [B, H, W, channels], and {site.kind} is called with '
        f'{images}'
      )
    net = Stack(site, blocks, root)
    net.check_tokens(name)
    patches = net.stack[0].input.shape[1] - lead_of(site)
    side = math.isqrt(max(1, images[1] * images[2] // max(patches, 1)))
    grid = (images[1] // side, images[2] // side)
    if grid[0] * grid[1] != patches:
      raise ValueError(
        f'{name}: {patches} patches are no grid over images of {images[1]}x{images[2]}'
      )
    if depths is not None and (len(depths) != 4 or sum(depths) != net.depth):
      raise ValueError(f'{name}: depths={depths} must be four numbers whose sum is {net.depth}')
    stage = (
      [i * 4 // net.depth for i in range(net.depth)]
      if depths is None
      else [j for j, n in enumerate(depths) for _ in range(n)]
    )
    return net, [[i for i in range(net.depth) if stage[i] == j] for j in range(4)], grid

  def begin_token(key, site, arrays):
    if len(site.input.shape) != 3:
      raise ValueError(
        f'{name}: reads one stream of tokens [B, N, d], and the block {site.path!r} is called with '
        f'{site.input.shape}'
      )
    width = site.input.shape[-1]
    bound = math.sqrt(6 / (1 + width))
    return {'meta': jax.random.uniform(key, (1, width), minval=-bound, maxval=bound)}

  def token(t, call, *args, **kwargs):
    meta = lambda x: jnp.broadcast_to(t['meta'].astype(x.dtype), (len(x), *t['meta'].shape))
    args, kwargs = enter(call, args, kwargs, 1, meta)
    out = call(*args, **kwargs)
    x, lead = jax.tree.leaves(out)[0], lead_of(call.site)
    rest = remove_tokens(call.site, x, 1)
    call.tap(meta=x[:, lead : lead + 1], patches=rest[:, lead:])
    return put_first(out, rest)

  def init(key, site, arrays):
    net, owned, _ = stages(site)
    keys = iter(jax.random.split(key, 64))
    channels = site.input.shape[-1]
    t = {
      'stem': {
        'conv1': _conv(next(keys), 3, channels, widths[0], False),
        'norm1': scales(widths[0]),
        'conv2': _conv(next(keys), 2, widths[0], widths[0]),
        'norm2': scales(widths[0]),
      }
    }
    for j, c in enumerate(widths):
      stage = {'norm': scales(c)}
      if j:
        stage |= {'down': _conv(next(keys), 3, widths[j - 1], c), 'down_norm': scales(c)}
      if n := len(owned[j]):
        stage['bridge'] = _dense(next(keys), net.width, c)
        stage['blocks'] = {
          'token_norm': scales(c, n),
          'norm1': scales(c, n),
          'norm2': scales(c, n),
          **{part: _dense(next(keys), c, c, n) for part in 'qkvo'},
          'fc1': _dense(next(keys), c, 4 * c, n),
          'fc2': _dense(next(keys), 4 * c, c, n),
        }
      t[f'stage{j}'] = stage
    if output == 'logits':
      t['head'] = _dense(next(keys), widths[-1], site.out.shape[-1])
    if output == 'segmentation':
      t['fpn'] = {
        **{f'lateral{j}': _conv(next(keys), 1, c, fpn_width) for j, c in enumerate(widths)},
        **{f'smooth{j}': _conv(next(keys), 3, fpn_width, fpn_width) for j in range(4)},
        'classes': _conv(next(keys), 1, fpn_width, classes),
      }
    return t

  def apply(t, call, *args, **kwargs):
    net, owned, grid = stages(call.site)
    images = next(iter(call.inputs(*args, **kwargs).values()))
    y = call(*args, **kwargs)
    taps, key = call.taps(), call.rng('hst drop path') if drop_path else None
    again = jax.checkpoint if remat else lambda fn: fn
    dtype = net.recorded(taps, 'patches', 0).dtype  # the images may be of another than the stream
    t = jax.tree.map(lambda a: a.astype(dtype), t)
    stem = t['stem']
    x = jax.nn.relu(layer_norm(stem['norm1'], _convolve(stem['conv1'], images.astype(dtype), 2, 1)))
    x = layer_norm(stem['norm2'], _convolve(stem['conv2'], x, 2, 0))
    maps = []
    for j, n_heads in enumerate(heads):
      stage = t[f'stage{j}']
      if j:
        x = layer_norm(stage['down_norm'], _convolve(stage['down'], x, 2, 1))
      for k, i in enumerate(owned[j]):
        sub = None if key is None else jax.random.fold_in(key, i)
        block = jax.tree.map(lambda a, k=k: a[k], stage['blocks'])
        run = again(
          functools.partial(_side_block, heads=n_heads, rate=drop_path, key=sub, grid=grid)
        )
        x = run(
          block, stage['bridge'], x, net.recorded(taps, 'meta', i), net.recorded(taps, 'patches', i)
        )
      x = layer_norm(stage['norm'], x)
      maps.append(x)
    if output == 'maps':
      return tuple(maps)
    if output == 'segmentation':
      return _pyramid(t['fpn'], maps)
    return put_first(y, linear(t['head'], layer_norm({}, maps[-1].mean((1, 2)))))

  return chain(
    tune(norms, name=name),
    at(blocks, Call(name, token, begin_token, taps=True, memory=FULL_CROSSING)),
    at(root, Call(name, apply, init, taps=True, memory=FULL_CROSSING, head=True)),
  )


def _side_block(t, bridge, x, token, patches, *, heads, rate, key, grid):
  """x [B, h, w, C] after one side block; token [B, 1, d] and patches [B, N, d] are the
  backbone's.
  """
  b, h, w, c = x.shape
  f = resize(linear(bridge, patches).reshape(b, *grid, c), (h, w)).reshape(b, h * w, c)
  keys = jnp.concatenate(
    [layer_norm(t['token_norm'], linear(bridge, token)), f.mean(1, keepdims=True)], 1
  )
  dropped = lambda y, i: (
    y
    if key is None
    else y
    * (jax.random.bernoulli(jax.random.fold_in(key, i), 1 - rate, (b, 1, 1)) / (1 - rate)).astype(
      y.dtype
    )
  )
  x = x.reshape(b, h * w, c)
  x = x + dropped(attend(t, layer_norm(t['norm1'], x), keys, heads), 0) + f
  x = x + dropped(linear(t['fc2'], jax.nn.gelu(linear(t['fc1'], layer_norm(t['norm2'], x)))), 1)
  return x.reshape(b, h, w, c)


def attend(t, x: jax.Array, keys: jax.Array, heads: int) -> jax.Array:
  """Attention from x [B, N, C] to keys [B, M, C]."""
  split = lambda y: y.reshape(*y.shape[:-1], heads, -1)
  y = jax.nn.dot_product_attention(
    split(linear(t['q'], x)), split(linear(t['k'], keys)), split(linear(t['v'], keys))
  )
  return linear(t['o'], y.reshape(x.shape))


def _pyramid(t, maps) -> jax.Array:
  """Logits [B, H / 4, W / 4, classes] of the four maps."""
  total, above = 0, None
  for j in reversed(range(4)):
    x = _convolve(t[f'lateral{j}'], maps[j], 1, 0)
    above = x if above is None else x + resize(above, x.shape[1:3])
    level = jax.nn.relu(_convolve(t[f'smooth{j}'], above, 1, 1))
    total = total + resize(level, maps[0].shape[1:3])
  return _convolve(t['classes'], total, 1, 0)


def resize(x: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Bilinear, corners not aligned, without smoothing: [B, h, w, C] to [B, *size, C]."""
  if x.shape[1:3] == tuple(size):
    return x
  return jax.image.resize(x, (len(x), *size, x.shape[-1]), 'bilinear', antialias=False)


def _dense(key, fan_in: int, fan_out: int, *lead: int) -> dict:
  kernel = 0.02 * jax.random.truncated_normal(key, -2, 2, (*lead, fan_in, fan_out))
  return {'kernel': kernel, 'bias': jnp.zeros((*lead, fan_out))}


def _conv(key, size: int, fan_in: int, fan_out: int, bias: bool = True) -> dict:
  kernel = math.sqrt(2 / (size * size * fan_out)) * jax.random.normal(
    key, (size, size, fan_in, fan_out)
  )
  return {'kernel': kernel, **({'bias': jnp.zeros(fan_out)} if bias else {})}


def _convolve(t, x: jax.Array, stride: int, padding: int) -> jax.Array:
  y = jax.lax.conv_general_dilated(
    x,
    t['kernel'].astype(x.dtype),
    (stride, stride),
    [(padding, padding)] * 2,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )
  return y + t['bias'] if 'bias' in t else y
