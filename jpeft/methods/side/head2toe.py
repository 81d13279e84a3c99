"""Head2Toe: a linear head over pooled activations from everywhere in the frozen backbone.

Evci et al., 2022 (arXiv 2201.03529; google-research/head2toe). Each activation [B, N, c] or [B, h,
w, c] is averaged to about `target` values an example: over all places if c >= target; else over
windows of floor(N / (target / c)) tokens, or of (w // floor(sqrt(target / c))) pixels squared. All
of them, flattened, and the model's own feature are read by one linear layer. Trained with
`group_lasso` in the loss, the features of the largest weights are kept by `select`, and a fresh
head is trained on those.

Deviations. Which activations those are is a pattern; its default, what embedding, attention and
MLPs give and the final norm, leaves out what enters the attention. Windows that do not divide the
extent drop the rest, as a pooling without padding does.
"""

import math

import jax
import jax.numpy as jnp

from jpeft.core import NO_BACKPROP, Call, Method, at, chain, factory

from . import features


@factory
def head2toe(
  target: int = 512,
  norm: bool = True,
  std: float = 0.01,
  taps: str = '{embed}|{attention}|{fc1}|{fc2}|{final_norm}',
  head: str = '{head}',
  name: str = 'head2toe',
) -> Method:
  """A linear head over all activations (arXiv 2201.03529); trains the head too.

  Args:
    target: values that an activation is averaged to, about.
    norm: whether each activation's values are brought to length 1.
    std: of the initial weights.
    taps: pattern of the modules whose first output is read.
    head: pattern of the module that maps the feature [B, d] to logits [B, C].
    name: in theta: {'kernel': [F, C], 'keep': [F]} of each module, 'bias' of the head.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, a model that does not give one
      prediction an example.
  """
  if target < 1:
    raise ValueError(f'head2toe: target={target} must be at least 1')

  def init(key, site, arrays):
    classes = features.head_of(site, head, name).out.shape[-1]
    if site.out is None or len(site.out.shape) not in (2, 3, 4):
      raise ValueError(
        f'{name}: {site.path!r} gives {None if site.out is None else site.out.shape}, and activations '
        'are [B, c], [B, N, c] or [B, h, w, c]'
      )
    width = jax.eval_shape(lambda x: averaged(x, target), site.out).shape[-1]
    return features.begin(key, width, classes, std)

  def apply(t, call, *args, **kwargs):
    out = call(*args, **kwargs)
    x = averaged(jax.lax.stop_gradient(jax.tree.leaves(out)[0]), target)
    call.tap(vote=features.vote(t, features.unit(x) if norm else x))
    return out

  return chain(
    at(taps, Call(name, apply, init, fixed=features.FIXED, taps=True, memory=NO_BACKPROP)),
    features.head_method(name, head, lambda classes: std, 0.0, norm),
  )


def averaged(x: jax.Array, target: int) -> jax.Array:
  """About `target` values [B, F] of an activation [B, c], [B, N, c] or [B, h, w, c]."""
  c = x.shape[-1]
  if x.ndim == 2:
    return x
  if c >= target:
    return x.mean(tuple(range(1, x.ndim - 1)))
  if x.ndim == 3:
    size = max(1, int(x.shape[1] / (target / c)))
    n = x.shape[1] // size
    return x[:, : n * size].reshape(len(x), n, size, c).mean(2).reshape(len(x), -1)
  size = max(1, x.shape[2] // math.isqrt(target // c))
  h, w = x.shape[1] // size, x.shape[2] // size
  x = x[:, : h * size, : w * size].reshape(len(x), h, size, w, size, c)
  return jnp.mean(x, (2, 4)).reshape(len(x), -1)
