"""SCT: some channels of each layer, chosen by class-aware norms, pass a small linear map.

Zhao et al., 2023, "SCT: A Simple Baseline for Parameter-Efficient Fine-Tuning via Salient Channels"
(arXiv 2309.08513); official code showlab/SCT. Of the D channels of a layer K are chosen before
training, I. For a token x [D]:

  y = x,  y_I = s_x x_I + s_w (x_I A + b)        A [K, K], b [K]

Where: `mode='attn'` between attention and MLP, on the stream that the second norm reads and the
residual goes round; 'mlp' on what the MLP adds; 'qkv' on queries and on values. 'mlp' and 'qkv'
change the rows of one layer and merge into it. 'attn' acts on a sum of layers, and does not merge.

Which channels: in one forward pass over the training examples, for the stream ('attn'), the output
of the block ('mlp') or that of the layer itself ('qkv'), leading special tokens left out,

  score_j = mean over classes c of |A_c[:, j]|     A_c [n_c N, D], all tokens of the images of c

The K largest, of equal ones the first. Squares are summed for each class, so that the pass keeps
classes x D numbers a layer. Padded tokens of texts count as any other.

Both scales are 1 unless given: the official configurations have one, which the released forward
pass ignores. A starts as a truncated normal of deviation .02, so that the function does not start
as the backbone; `init='zero'` does. The channels are state: theta has them beside A and b.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import (
  Call,
  Found,
  Method,
  Pass,
  Preparation,
  Site,
  Weight,
  at,
  chain,
  factory,
  prepared_by,
)

from ..arguments import first_array, on_first
from ..check import choice, require, whole

MODES = ('attn', 'mlp', 'qkv')
# Where the modes act that change one layer.
_LAYERS = {'mlp': '{fc2}', 'qkv': '{q}|{v}'}
_STD = 0.02


@factory
def sct(
  channels: int = 96,
  mode: str = 'attn',
  scale: float = 1.0,
  scaled: str = 'map',
  init: str = 'default',
  blocks: str = '{block}',
  stream: str = '{norm2}',
  targets: str | None = None,
  name: str = 'sct',
) -> Method:
  """Salient channel tuning. It waits for a pass over training examples, see `prepare`.

  Args:
    channels: K, an eighth of the width in the paper.
    mode: 'attn', 'mlp' or 'qkv'.
    scale: s, of what `scaled` says; the other is 1.
    scaled: 'map' for s_w, 'identity' for s_x.
    init: 'default' or 'zero'.
    blocks: pattern of the blocks; read by 'attn' and 'mlp'.
    stream: pattern of the modules, one in each block, whose input is the stream; read by 'attn'.
    targets: pattern of the layers that 'mlp' and 'qkv' change; {fc2}, or {q} and {v} if left out.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range; at the pass or at `attach`, more channels than
      there are, labels that are no classes, or a layer without the bias that b is added to.
  """
  whole('sct', 'channels', channels, 1)
  choice('sct', 'mode', mode, MODES)
  choice('sct', 'scaled', scaled, ('map', 'identity'))
  choice('sct', 'init', init, ('default', 'zero'))
  is_of_layer = mode in _LAYERS
  rule = "is of mode='mlp' and mode='qkv': leave it out"
  require(targets is None or is_of_layer, 'sct', 'targets', targets, rule)
  made = _Sct(
    channels,
    mode,
    scale if scaled == 'identity' else 1.0,
    scale if scaled == 'map' else 1.0,
    init,
    blocks,
    stream,
    targets or _LAYERS.get(mode, ''),
    name,
  )
  preparation = Preparation('chooses channels', made.find, made.resolved, told, size=50)
  return prepared_by(made.method(), preparation)


def told(found: Found) -> str:
  """How many channels were chosen, and where."""
  layers = sum(math.prod(x.shape[:-1]) for x in found.values())
  (count,) = {x.shape[-1] for x in found.values()}
  return f'chose {count} channels in each of {layers} places'


@dataclasses.dataclass(frozen=True, eq=False)
class _Sct:
  """The rules of `sct`; the fields are its arguments, with the two scales apart.

  Attributes:
    found: {path: channels [layers of a stack, K]}; None before the pass.
  """

  channels: int
  mode: str
  scale_identity: float
  scale_map: float
  start: str
  blocks: str
  stream: str
  targets: str
  name: str
  found: Found | None = None

  def method(self) -> Method:
    if self.mode == 'attn':
      block = Call(self.name, self.around_block)
      return chain(
        at(self.blocks, block), at(self.stream, Call(self.name, self.on_stream, self.init_stream))
      )
    return at(self.targets, Weight(self.name, self.init_layer, self.weights, self.product))

  def resolved(self, found: Found) -> Method:
    return dataclasses.replace(self, found=found).method()

  # Theta.

  def init_stream(self, key, site: Site, arrays) -> dict:
    return self.init(key, site, arrays.number, site.input.shape[-1])

  def init_layer(self, key, site: Site, arrays) -> dict:
    width = self.check_layer(site)
    return self.init(key, site, arrays.number, width)

  def init(self, key, site: Site, number, width: int) -> dict:
    self.check_width(site, width)
    shape = (self.channels, self.channels)
    kernel = jnp.zeros(shape)
    if self.start == 'default':
      kernel = _STD * jax.random.truncated_normal(key, -2, 2, shape)
    chosen = self.chosen(site, number)
    return {'channels': chosen, 'kernel': kernel, 'bias': jnp.zeros(self.channels)}

  def chosen(self, site: Site, number) -> jax.Array:
    """I of one layer; before the pass the first channels."""
    if self.found is None:
      return jnp.arange(self.channels)
    layers = math.prod(site.theta_lengths)
    x = self.found.get(site.path)
    if x is None or x.shape != (layers, self.channels):
      raise ValueError(
        f'{self.name} at {site.path!r}: channels were chosen for other layers, or by other '
        'hyperparameters: make the pass again (jpeft.prepare)'
      )
    return site.one_layer(x, number)

  def check_width(self, site: Site, width: int) -> None:
    rule = f'is more than the {width} channels of {site.path!r}'
    require(self.channels <= width, self.name, 'channels', self.channels, rule)

  def check_layer(self, site: Site) -> int:
    """The number of outputs of a layer that has one kernel, and a bias for each of them."""
    one = len(site.matrices) == 1 and not site.leaves[site.matrices[0]].batch
    if one:
      width = site.leaves[site.matrices[0]].fan_out
      if len(_biases(site, width)) == 1:
        return width
    raise ValueError(
      f'{self.name} at {site.path!r}: mode={self.mode!r} needs a layer with one kernel and a bias '
      f"(it has {', '.join(site.leaves) or 'none'}); mode='attn' needs none"
    )

  # On the stream between attention and MLP. The residual goes round the norm, so that what is added
  # before it is added to the output of the block as well.

  def on_stream(self, t, call, *args, **kwargs):
    """At the norm: changes what it reads, and hands the change to the block around it."""
    if call.outer is None:
      raise ValueError(
        f'{self.name}: {call.site.path!r}, the stream, lies in no block that {self.blocks!r} names'
      )
    x = first_array(call, args, kwargs)
    change = self.change(t, x[..., t['channels']])
    call.outer['change'] = t['channels'], change
    args, kwargs = on_first(call, args, kwargs, lambda x: x.at[..., t['channels']].add(change))
    return call(*args, **kwargs)

  def around_block(self, t, call, *args, **kwargs):
    """At the block: adds the change to the output."""
    out = call(*args, **kwargs)
    if 'change' not in call.local:
      raise ValueError(
        f'{self.name}: nothing inside {call.site.path!r} is named by stream={self.stream!r}'
      )
    channels, change = call.local['change']
    try:
      return call.site.map_stream(out, lambda h: h.at[..., channels].add(change))
    except jax.errors.UnexpectedTracerError as error:
      raise ValueError(
        f'{self.name}: {call.site.path!r} runs its inside under a jit or remat of its own, which '
        'the stream cannot leave: apply that to the whole block, from outside'
      ) from error

  def change(self, t: Mapping, x: jax.Array, bias: bool = True) -> jax.Array:
    """What is added to the chosen channels x [..., K]."""
    y = x @ t['kernel'].astype(x.dtype)
    if bias:
      y = y + t['bias'].astype(x.dtype)
    y = self.scale_map * y
    if self.scale_identity != 1:
      y = y + (self.scale_identity - 1) * x
    return y

  # On one layer: its kernel [fan_in, D] and its bias [D] are rows of channels alike.

  def product(self, t, x, y, w, key) -> jax.Array:
    return self.applied(t, y, bias=False)

  def weights(self, t, site: Site, arrays) -> dict:
    (kernel,) = site.matrices
    leaf = site.leaves[kernel]
    (bias,) = _biases(site, leaf.fan_out)
    rows = leaf.fold(arrays[kernel])
    vector = arrays[bias]
    changed = self.applied(t, vector.reshape(-1), bias=True)
    return {
      kernel: leaf.unfold(self.applied(t, rows, bias=False)),
      bias: changed.reshape(vector.shape),
    }

  def applied(self, t: Mapping, y: jax.Array, bias: bool) -> jax.Array:
    """y [..., D] with the change of its chosen channels."""
    chosen = t['channels']
    return y.at[..., chosen].add(self.change(t, y[..., chosen], bias).astype(y.dtype))

  # The pass.

  def find(self, examples: Pass) -> dict[str, np.ndarray]:
    """{path: the channels of its layers [layers, K]}."""
    scores: dict[str, Scores] = {}
    for batch, taps in examples.tapped(self.taps(examples)):
      labels = _classes(self.name, examples.fetch(batch.labels))
      counts = np.ones(len(labels), bool)
      if batch.mask is not None:
        counts = np.asarray(examples.fetch(batch.mask)) > 0
      for path, tap in taps.items():
        squares = tap['squares']
        squares = squares.reshape(-1, *squares.shape[-2:])  # [layers, B, D]
        scores.setdefault(path, Scores()).add(squares[:, counts], labels[counts])
    found = {}
    for site, scored, columns in self.scored(examples):
      found[site.path] = most_salient(scores[scored].of_channels()[:, columns], self.channels)
    return found

  def taps(self, examples: Pass) -> Method:
    """A method that records the squares of what is scored."""
    name = f'{self.name} scores'
    if self.mode == 'attn':
      return at(self.stream, Call(name, _tap_input))
    if self.mode == 'mlp':
      return at(self.blocks, Call(name, _tap_stream))
    owners = dict.fromkeys(re.escape(site.owner) for site in examples.find(self.targets))
    return at('|'.join(owners), Call(name, _tap_columns))

  def scored(self, examples: Pass) -> list[tuple[Site, str, Any]]:
    """(a site of theta, the path whose channels are scored for it, which of these are its own)."""
    if self.mode == 'attn':
      return [(site, site.path, slice(None)) for site in examples.find(self.stream)]
    sites = examples.find(self.targets)
    if self.mode == 'qkv':
      return [(site, site.owner, site.columns(site.matrices[0])) for site in sites]
    blocks = [site.path for site in examples.find(self.blocks)]
    return [(site, _around(self.name, site.path, blocks), slice(None)) for site in sites]


class Scores:
  """Norms of channels, class by class, from sums of squares; float64 on the host."""

  def __init__(self):
    self._sums: dict[int, np.ndarray] = {}

  def add(self, squares: np.ndarray, labels: np.ndarray) -> None:
    """Takes in the sums over tokens [layers, B, D] of examples of some classes [B]."""
    for label in np.unique(labels):
      new = squares[:, labels == label].sum(1, dtype=np.float64)
      self._sums[label] = self._sums.get(label, 0) + new

  def of_channels(self) -> np.ndarray:
    """The mean over classes of the norms, [layers, D]."""
    return np.mean([np.sqrt(sums) for sums in self._sums.values()], 0)


def most_salient(scores: np.ndarray, count: int) -> np.ndarray:
  """The `count` largest along the last axis, ascending; of equal ones the first."""
  order = np.argsort(-scores, -1, kind='stable')
  return np.sort(order[..., :count], -1).astype(np.int32)


def squares_of(x: jax.Array, lead: int) -> jax.Array:
  """The sums [B, D] of the squares of x [B, ..., D] in float32.

  Of tokens [B, N, D] the first `lead` are left out.
  """
  if x.ndim == 3:
    x = x[:, lead:]
  return jnp.square(x.astype(jnp.float32)).sum(range(1, x.ndim - 1))


def _tap_input(t, call, *args, **kwargs):
  x = first_array(call, args, kwargs)
  call.tap(squares=squares_of(x, call.site.model.lead))
  return call(*args, **kwargs)


def _tap_stream(t, call, *args, **kwargs):
  out = call(*args, **kwargs)
  call.tap(squares=squares_of(call.site.stream(out), call.site.model.lead))
  return out


def _tap_columns(t, call, *args, **kwargs):
  """Of a layer, whose output may have several axes in the order of its folded kernel."""
  out = call(*args, **kwargs)
  leaf = call.site.leaves[call.site.matrices[0]]
  x = call.site.stream(out)
  outs = tuple(leaf.shape[i] for i in leaf.outs)
  if x.shape[-len(outs) :] != outs:
    raise ValueError(
      f'sct at {call.site.path!r}: its output {list(x.shape)} does not end as its kernel '
      f"{list(outs)}, so that its channels cannot be told: use mode='attn' or mode='mlp'"
    )
  rows = x.reshape(*x.shape[: x.ndim - len(outs)], -1)
  call.tap(squares=squares_of(rows, call.site.model.lead))
  return out


def _around(name: str, path: str, blocks: list[str]) -> str:
  """The block that a layer lies in."""
  for block in blocks:
    if path.startswith(f'{block}/'):
      return block
  raise ValueError(f'{name}: {path!r} lies in none of the blocks {", ".join(blocks[:3])}, ...')


def _classes(name: str, labels: Any) -> np.ndarray:
  labels = np.asarray(labels)
  if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
    raise ValueError(
      f'{name} ranks channels by class, and needs the number of a class for each example, not '
      f'labels {labels.dtype} {list(labels.shape)}'
    )
  return labels


def _biases(site: Site, width: int) -> list[str]:
  """The names of the vectors of a layer that have a number for each output."""
  rest = {name: leaf for name, leaf in site.leaves.items() if not leaf.is_matrix}
  return [name for name, leaf in rest.items() if math.prod(leaf.shape) == width]
