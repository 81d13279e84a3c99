"""Head2Toe: a linear head over pooled activations from everywhere in the frozen backbone.

Evci et al., 2022 (arXiv 2201.03529; google-research/head2toe). Each activation [B, N, c] or [B, h,
w, c] is averaged to about `target` values an example: over all places if c >= target; else over
windows of floor(N / (target / c)) tokens, or of (w // floor(sqrt(target / c))) pixels squared. All
of them, flattened, and the model's own feature are read by one linear layer. Trained with `lasso`,
which adds its `group_lasso` to the loss, the features of the largest weights are kept by `select`,
and a fresh head is trained on those.

Deviations. Which activations those are is a pattern; its default, what embedding, attention and
MLPs give and the final norm, leaves out what enters the attention. Windows that do not divide the
extent drop the rest, as a pooling without padding does.
"""

import dataclasses
import math

import jax
from einops import rearrange, reduce

from jpeft.core import NO_BACKPROP, Call, Method, at, chain, factory

from ..check import at_least
from . import features


@factory
def head2toe(
  target: int = 512,
  norm: bool = True,
  std: float = 0.01,
  taps: str = '{embed}|{attention}|{fc1}|{fc2}|{final_norm}',
  head: str = '{head}',
  lasso: float = 0.0,
  name: str = 'head2toe',
) -> Method:
  """A linear head over all activations (arXiv 2201.03529); trains the head too.

  Args:
    target: values that an activation is averaged to, about.
    norm: whether each activation's values are brought to length 1.
    std: of the initial weights.
    taps: pattern of the modules whose first output is read.
    head: pattern of the module that maps the feature [B, d] to logits [B, C].
    lasso: factor of the group lasso, which training adds to the loss.
    name: in theta: {'kernel': [F, C], 'keep': [F]} of each module, 'bias' of the head.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, a model that does not give one
      prediction an example.
  """
  return _Head2Toe(target, norm, std, taps, head, lasso, name).method()


@dataclasses.dataclass(frozen=True, eq=False)
class _Head2Toe:
  """The hyperparameters of `head2toe`, and its rules as methods."""

  target: int
  norm: bool
  std: float
  taps: str
  head: str
  lasso: float
  name: str

  def __post_init__(self):
    if self.target < 1:
      raise ValueError(f'head2toe: target={self.target} must be at least 1')
    at_least('head2toe', 'lasso', self.lasso, 0)

  def method(self) -> Method:
    """Each activation adds its own part of the logits; the head sums them."""
    part = Call(
      self.name, self.apply, self.init, fixed=features.FIXED, taps=True, memory=NO_BACKPROP
    )
    head = features.head_method(
      self.name, self.head, lambda classes: self.std, norm=self.norm, lasso=self.lasso
    )
    return chain(at(self.taps, part), head)

  def init(self, key, site, arrays):
    rows, classes = features.head_of(site, self.head, self.name).out.shape
    if site.out is None or len(site.out.shape) not in (2, 3, 4):
      shape = None if site.out is None else site.out.shape
      raise ValueError(
        f'{self.name}: {site.path!r} gives {shape}, and activations are [B, c], [B, N, c] or '
        '[B, h, w, c]'
      )
    if site.out.shape[0] > rows:
      raise ValueError(
        f'{self.name}: {site.path!r} gives {site.out.shape}, pieces of the {rows} examples as rows '
        'of a larger batch: leave it out of taps='
      )
    pooled = jax.eval_shape(lambda x: averaged(x, self.target), site.out)
    return features.begin(key, pooled.shape[-1], classes, self.std)

  def apply(self, t, call, *args, **kwargs):
    out = call(*args, **kwargs)
    x = averaged(jax.lax.stop_gradient(call.site.stream(out)), self.target)
    if self.norm:
      x = features.unit(x)
    call.tap(vote=features.vote(t, x))
    features.penalise(call, self.name, t, self.lasso)
    return out


def averaged(x: jax.Array, target: int) -> jax.Array:
  """About `target` values [B, F] of an activation [B, c], [B, N, c] or [B, h, w, c]."""
  channels = x.shape[-1]
  if x.ndim == 2:
    return x
  if channels >= target:
    return reduce(x, 'b ... c -> b c', 'mean')
  if x.ndim == 3:
    size = max(1, int(x.shape[1] / (target / channels)))
    count = x.shape[1] // size
    x = x[:, : count * size]  # the rest makes no whole window
    windows = reduce(x, 'b (n size) c -> b n c', 'mean', size=size)
    return rearrange(windows, 'b n c -> b (n c)')
  size = max(1, x.shape[2] // math.isqrt(target // channels))
  rows = x.shape[1] // size
  columns = x.shape[2] // size
  x = x[:, : rows * size, : columns * size]
  windows = reduce(x, 'b (h i) (w j) c -> b h w c', 'mean', i=size, j=size)
  return rearrange(windows, 'b h w c -> b (h w c)')
