"""Hierarchical side-tuning: a four-stage pyramid beside a plain ViT.

Lin et al., 2023 (arXiv 2310.05393; AFeng-x/HST), for classification and dense prediction. The
letters:

  e_i [1, d]     a trained token that takes part in the attention of backbone block i
  G_i [B, 1, d]  what e_i has become behind the block
  V_i [B, N, d]  the patches behind the block
  C_j            the width of stage j = 0 .. 3, at stride 4 2^j of the image
  x   [B, h, w, C_j]  the map of stage j

Each stage owns a quarter of the blocks, and runs for each of them, with T_j a linear map d -> C_j,

  g = LN_i(T_j G_i),  f = resize(T_j V_i) to h x w,  K = [g; mean of f]
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
which makes no difference to attention. The dense head is ours.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
from einops import rearrange

from jpeft.core import FULL_CROSSING, Call, Method, Site, at, chain, factory

from ..arguments import first_array
from ..nn import (
  attend,
  conv,
  convolve,
  dense,
  drop_path,
  glorot_bound,
  layer_norm,
  linear,
  put_stream,
  remat_if,
  scales,
  truncated_normal,
  uniform,
)
from ..subset.tune import tune
from ..tokens import Tokens
from .stack import Stack

OUTPUTS = ('logits', 'maps', 'segmentation')
STAGES = range(4)

_dense = functools.partial(dense, std=0.02, draw=truncated_normal)


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
  if depths is not None:
    depths = tuple(depths)
  return _HST(
    widths=tuple(widths),
    heads=tuple(heads),
    depths=depths,
    output=output,
    classes=classes,
    fpn_width=fpn_width,
    drop_path=drop_path,
    remat=remat,
    blocks=blocks,
    norms=norms,
    root=root,
    name=name,
  ).method()


@dataclasses.dataclass(frozen=True)
class _HST:
  """The rules of `hst`; the fields are its arguments."""

  widths: tuple[int, ...]
  heads: tuple[int, ...]
  depths: tuple[int, ...] | None
  output: str
  classes: int | None
  fpn_width: int
  drop_path: float
  remat: bool
  blocks: str
  norms: str
  root: str
  name: str

  def method(self) -> Method:
    """The trained norms, a token in every block, and the pyramid at the model."""
    token = Call(self.name, self.apply_token, self.init_token, taps=True, memory=FULL_CROSSING)
    pyramid = Call(self.name, self.apply, self.init, taps=True, memory=FULL_CROSSING, head=True)
    return chain(
      tune(self.norms, name=self.name),
      at(self.blocks, token),
      at(self.root, pyramid),
    )

  # Shapes

  def stack(self, site: Site) -> Stack:
    """The backbone's blocks, in a model that reads images."""
    images = _shape_of_images(site)
    if len(images) != 4:
      raise ValueError(
        f'{self.name}: a pyramid is built on images [B, H, W, channels], and {site.kind} is called '
        f'with {images}'
      )
    net = Stack(site, self.blocks, self.root)
    net.check_tokens(self.name)
    return net

  def grid(self, net: Stack) -> tuple[int, int]:
    """Rows and columns of patches."""
    _, height, width, _ = _shape_of_images(net.site)
    patches = net.stack[0].input.shape[1] - net.site.model.lead
    patch_size = math.isqrt(max(1, height * width // max(patches, 1)))
    rows, columns = height // patch_size, width // patch_size
    if rows * columns != patches:
      raise ValueError(
        f'{self.name}: {patches} patches are no grid over images of {height}x{width}'
      )
    return rows, columns

  def owned(self, depth: int) -> list[list[int]]:
    """The blocks of each stage."""
    if self.depths is None:
      return [[i for i in range(depth) if i * 4 // depth == j] for j in STAGES]
    if len(self.depths) != 4 or sum(self.depths) != depth:
      raise ValueError(
        f'{self.name}: depths={self.depths} must be four numbers whose sum is {depth}'
      )
    ends = itertools.accumulate(self.depths)
    return [list(range(end - count, end)) for count, end in zip(self.depths, ends, strict=True)]

  # The tokens in the backbone

  def init_token(self, key, site: Site, arrays) -> dict:
    """{'meta': e_i [1, d]} of one block."""
    if len(site.input.shape) != 3:
      raise ValueError(
        f'{self.name}: reads one stream of tokens [B, N, d], and the block {site.path!r} is called '
        f'with {site.input.shape}'
      )
    width = site.input.shape[-1]
    return {'meta': uniform(key, (1, width), glorot_bound(1, width))}

  def apply_token(self, t, call, *args, **kwargs):
    """Runs a block with e_i among its tokens, records G_i and V_i, and returns the other tokens."""

    token = Tokens(1)
    args, kwargs = token.enter(call, args, kwargs, t['meta'])
    out, meta = token.leave(call, call(*args, **kwargs))  # meta is G_i [B, 1, d]
    special = call.site.model.lead
    call.tap(meta=meta, patches=call.site.stream(out)[:, special:])
    return out

  # The pyramid beside it

  def init(self, key, site: Site, arrays) -> dict:
    """{'stem', 'stage0' .. 'stage3', and 'head' or 'fpn'}: the parameters beside the backbone."""
    net = self.stack(site)
    self.grid(net)  # refuses patches that are no grid
    owned = self.owned(net.depth)
    keys = iter(jax.random.split(key, 64))
    channels = site.input.shape[-1]
    t = {'stem': self.init_stem(keys, channels)}
    for j in STAGES:
      t[f'stage{j}'] = self.init_stage(keys, j, net.width, len(owned[j]))
    if self.output == 'logits':
      t['head'] = _dense(next(keys), self.widths[-1], site.out.shape[-1])
    if self.output == 'segmentation':
      t['fpn'] = self.init_fpn(keys)
    return t

  def init_stem(self, keys, channels: int) -> dict:
    """The stem of images of some channels."""
    width = self.widths[0]
    return {
      'conv1': _conv(next(keys), 3, channels, width, bias=False),
      'norm1': scales(width),
      'conv2': _conv(next(keys), 2, width, width),
      'norm2': scales(width),
    }

  def init_stage(self, keys, j: int, backbone_width: int, blocks: int) -> dict:
    """Stage j with some side blocks, their parameters stacked."""
    width = self.widths[j]
    t = {'norm': scales(width)}
    if j > 0:
      t['down'] = _conv(next(keys), 3, self.widths[j - 1], width)
      t['down_norm'] = scales(width)
    if blocks == 0:
      return t
    t['bridge'] = _dense(next(keys), backbone_width, width)
    t['blocks'] = {
      'token_norm': scales(width, blocks),
      'norm1': scales(width, blocks),
      'norm2': scales(width, blocks),
      **{name: _dense(next(keys), width, width, blocks) for name in 'qkvo'},
      'fc1': _dense(next(keys), width, 4 * width, blocks),
      'fc2': _dense(next(keys), 4 * width, width, blocks),
    }
    return t

  def init_fpn(self, keys) -> dict:
    """The semantic FPN."""
    width = self.fpn_width
    laterals = {f'lateral{j}': _conv(next(keys), 1, self.widths[j], width) for j in STAGES}
    smooths = {f'smooth{j}': _conv(next(keys), 3, width, width) for j in STAGES}
    return {**laterals, **smooths, 'classes': _conv(next(keys), 1, width, self.classes)}

  def apply(self, t, call, *args, **kwargs):
    """The model's output, made from the maps of the four stages."""
    net = self.stack(call.site)
    grid = self.grid(net)
    images = first_array(call, args, kwargs)
    y = call(*args, **kwargs)
    taps = call.taps()
    key = None
    if self.drop_path:
      key = call.rng('hst drop path')
    # The images may have another dtype than the stream.
    dtype = net.recorded(taps, 'patches', 0).dtype
    t = jax.tree.map(lambda array: array.astype(dtype), t)

    x = stem(t['stem'], images.astype(dtype))
    maps = []
    for j, blocks in enumerate(self.owned(net.depth)):
      stage = t[f'stage{j}']
      if j > 0:
        x = layer_norm(stage['down_norm'], convolve(stage['down'], x, strides=2, padding=1))
      for k, i in enumerate(blocks):
        side_block = functools.partial(
          self.side_block,
          heads=self.heads[j],
          grid=grid,
          key=None if key is None else jax.random.fold_in(key, i),
        )
        x = remat_if(self.remat, side_block)(
          jax.tree.map(lambda array, k=k: array[k], stage['blocks']),
          stage['bridge'],
          x,
          net.recorded(taps, 'meta', i),
          net.recorded(taps, 'patches', i),
        )
      x = layer_norm(stage['norm'], x)
      maps.append(x)

    if self.output == 'maps':
      return tuple(maps)
    if self.output == 'segmentation':
      return segmentation(t['fpn'], maps)
    feature = maps[-1].mean((1, 2))  # [B, C_3]
    return put_stream(call.site, y, linear(t['head'], layer_norm({}, feature)))

  def side_block(self, t, bridge, x, token, patches, *, heads: int, grid: tuple[int, int], key):
    """The map x after the side block beside backbone block i.

    Args:
      t: the parameters of the side block.
      bridge: those of T_j.
      x: [B, h, w, C_j].
      token: G_i [B, 1, d].
      patches: V_i [B, N, d].
      heads: of the attention.
      grid: rows and columns of the N patches.
      key: for drop path; None for none.
    """
    height, width = x.shape[1:3]
    rows, columns = grid
    g = layer_norm(t['token_norm'], linear(bridge, token))  # [B, 1, C]
    f = rearrange(linear(bridge, patches), 'b (r c) w -> b r c w', r=rows, c=columns)
    f = rearrange(resize(f, (height, width)), 'b h w c -> b (h w) c')
    keys = jnp.concatenate([g, f.mean(1, keepdims=True)], 1)  # [B, 2, C]

    attention_key = None
    mlp_key = None
    if key is not None:
      attention_key = jax.random.fold_in(key, 0)
      mlp_key = jax.random.fold_in(key, 1)
    x = rearrange(x, 'b h w c -> b (h w) c')
    y = attend(t, layer_norm(t['norm1'], x), keys, heads)
    x = x + drop_path(y, attention_key, self.drop_path) + f
    y = linear(t['fc1'], layer_norm(t['norm2'], x))
    y = linear(t['fc2'], jax.nn.gelu(y))
    x = x + drop_path(y, mlp_key, self.drop_path)
    return rearrange(x, 'b (h w) c -> b h w c', h=height, w=width)


def _shape_of_images(site: Site) -> tuple[int, ...]:
  if site.input is None:
    return ()
  return site.input.shape


def stem(t, images: jax.Array) -> jax.Array:
  """The first map: images [B, H, W, channels] to [B, H / 4, W / 4, C_0]."""
  x = layer_norm(t['norm1'], convolve(t['conv1'], images, strides=2, padding=1))
  x = jax.nn.relu(x)
  return layer_norm(t['norm2'], convolve(t['conv2'], x, strides=2, padding=0))


def segmentation(t, maps: list[jax.Array]) -> jax.Array:
  """Logits [B, H / 4, W / 4, classes] of the four maps, by a semantic FPN."""
  finest = maps[0].shape[1:3]
  levels = []
  above = None
  for j in reversed(STAGES):
    x = convolve(t[f'lateral{j}'], maps[j], padding=0)
    if above is not None:
      x = x + resize(above, x.shape[1:3])
    level = jax.nn.relu(convolve(t[f'smooth{j}'], x, padding=1))
    levels.append(resize(level, finest))
    above = x
  return convolve(t['classes'], sum(levels), padding=0)


def resize(x: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Bilinear, corners not aligned, without smoothing: [B, h, w, C] to [B, *size, C]."""
  if x.shape[1:3] == tuple(size):
    return x
  return jax.image.resize(x, (len(x), *size, x.shape[-1]), 'bilinear', antialias=False)


def _conv(key, size: int, fan_in: int, fan_out: int, bias: bool = True) -> dict:
  """A square convolution, whose std is that of He et al. for the width of the output."""
  std = math.sqrt(2 / (size * size * fan_out))
  return conv(key, (size, size), fan_in, fan_out, std=std, bias=bias)
