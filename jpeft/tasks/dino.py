"""DINO: images alone, views of which a model is to tell alike, taught by its own moving average.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", 2021 (arXiv 2104.14294),
with the balanced targets of DINOv2 (Oquab et al., 2023, arXiv 2304.07193). Of the views v of an
image, of which the first two are large, K prototypes and the head g on the feature f:

  student   p_v = softmax(g(f(v)) / 0.1)                            [K], of all views
  teacher   q_u = Sinkhorn-Knopp of g'(f'(u)) / 0.07 over a batch   [K], of the large views
  loss      mean over pairs u != v of -sum_k q_u log p_v
  teacher's theta <- m theta' + (1 - m) theta, m from `pretraining.momentum` to 1 along a cosine

Sinkhorn-Knopp uses all prototypes alike in a batch, so that no centre has to be kept, and nothing
collapses: a model that tells all images alike has the loss log K. It balances a whole batch, also
one that is cut into micro-batches.

What is simple here: views are random rectangles, mirrored where `data.augment` is 'flip_crop' or
'imagenet', without changes of colour; small views are resized to the size of the model, whose
positions are for it, so that each costs a whole image. The loss is that of images: there is no loss
of patches (iBOT) and none of spread (KoLeo). The teacher's temperature is not warmed up, and it
runs without dropout. The head, 3 layers, a bottleneck of 256 and prototypes of length 1, is trained
from scratch, and dropped at the end with the teacher.

An evaluation takes the model itself as the teacher.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft import data
from jpeft.core import Call, Method, Site, at

from . import images
from .task import NO_FACTS, Facts, Task, Teacher

NAME = 'dino'
WIDTH, DEPTH, BOTTLENECK = 2048, 3, 256  # of the head
STUDENT, TEACHER = 0.1, 0.07  # temperatures
ROUNDS = 3  # of Sinkhorn-Knopp
FLIPPED = ('flip_crop', 'imagenet')  # augmentations of images that may be mirrored


def parts(config, pretrained) -> Method:
  """The head, and the loss of several views."""
  chosen = config.pretraining
  return dino(chosen.prototypes, chosen.width or WIDTH, chosen.depth or DEPTH)


def dino(prototypes: int = 4096, width: int = WIDTH, depth: int = DEPTH) -> Method:
  """Turns a model of features [B, D] into one that tells which prototypes images are like.

  Called with images [B, H, W, C], and `views=` [B, V - 1, H, W, C] of them if there are more, it
  returns {'logits': [B, V, prototypes], 'features': [B, V, D]}; with `told=` [B, 2, prototypes]
  of a teacher also {'losses': [B]}.

  Args:
    prototypes: K.
    width: of the hidden layers of the head.
    depth: layers of the head before the prototypes.

  Raises:
    ValueError: at `attach`, a model that returns no feature for each image.
  """
  rules = _Dino(prototypes, width, depth)
  rule = Call(NAME, rules.model, rules.init, merge=images.not_merged, takes=('views', 'told'))
  return at('', rule)


@dataclasses.dataclass(frozen=True, eq=False)
class _Dino:
  """The rule of `dino`; the fields are its arguments."""

  prototypes: int
  width: int
  depth: int

  def init(self, key, site: Site, arrays) -> dict:
    if site.out is None or len(site.out.shape) != 2:
      raise ValueError(
        'dino: the model must return one feature for each image, [B, D]: leave out its head'
      )
    widths = [site.out.shape[-1], *[self.width] * (self.depth - 1), BOTTLENECK]
    keys = jax.random.split(key, self.depth + 1)
    layers = {}
    for i, (fan_in, fan_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
      kernel = 0.02 * jax.random.truncated_normal(keys[i], -2, 2, (fan_in, fan_out))
      layers[f'layer_{i}'] = {'kernel': kernel, 'bias': jnp.zeros(fan_out)}
    drawn = jax.random.normal(keys[-1], (BOTTLENECK, self.prototypes))
    return {**layers, 'prototypes': drawn / jnp.linalg.norm(drawn, axis=0)}

  def head(self, t, x: jax.Array) -> jax.Array:
    """Features [.., D] as cosines with the prototypes, [.., K]."""
    x = x.astype(jnp.float32)
    for i in range(self.depth):
      layer = t[f'layer_{i}']
      x = x @ layer['kernel'] + layer['bias']
      if i + 1 < self.depth:
        x = jax.nn.gelu(x, approximate=False)
    return _unit(x, -1) @ _unit(t['prototypes'], 0)

  def model(self, t, call, pictures, *args, views=None, told=None, **kwargs):
    """What the model tells of all views, and the loss beside a teacher."""
    shown = pictures[:, None]
    if views is not None:
      shown = jnp.concatenate([shown, views.astype(shown.dtype)], 1)
    count = shown.shape[1]
    features = call(shown.reshape(-1, *shown.shape[2:]), *args, **kwargs)
    features = features.reshape(-1, count, features.shape[-1])
    out = {'logits': self.head(t, features), 'features': features}
    if told is not None:
      out['losses'] = losses(out['logits'], told)
    return out


def _unit(x: jax.Array, axis: int) -> jax.Array:
  """x at length 1 along an axis."""
  square = jnp.square(x).sum(axis, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, 1e-12))


# ---- Losses.


def losses(logits: jax.Array, told: jax.Array) -> jax.Array:
  """The loss of each image, [B].

  Args:
    logits: [B, V, K] of the student.
    told: [B, U, K], what a teacher says of the first U views; U < V, or one view says nothing.
  """
  says = jax.nn.log_softmax(logits.astype(jnp.float32) / STUDENT, -1)
  pairs = -jnp.einsum('buk,bvk->buv', told, says)
  other = 1 - jnp.eye(told.shape[1], logits.shape[1])
  return (pairs * other).sum((1, 2)) / other.sum()


def balanced(logits: jax.Array, counted: jax.Array | None = None) -> jax.Array:
  """What a teacher says, with all prototypes used alike: Sinkhorn-Knopp over all views of a batch.

  Args:
    logits: [B, U, K].
    counted: [B], 0 for images that only fill the batch up; all count if left out.

  Returns:
    [B, U, K], each a distribution over prototypes.
  """
  prototypes = logits.shape[-1]
  table = (logits.astype(jnp.float32) / TEACHER).reshape(-1, prototypes)
  if counted is not None:
    there = jnp.repeat(counted > 0, logits.shape[1])
    table = jnp.where(there[:, None], table, -jnp.inf)
  for _ in range(ROUNDS):
    table = table - jax.nn.logsumexp(table, 0, keepdims=True)
    rows = jax.nn.logsumexp(table, 1, keepdims=True)
    table = table - jnp.where(jnp.isfinite(rows), rows, 0)
  return jnp.exp(table).reshape(logits.shape)


# ---- The teacher.


def momentum(config, steps: int) -> Callable[[Any], Any]:
  """m of each update, from `pretraining.momentum` to 1 along a cosine."""
  start = config.pretraining.momentum

  def at_update(number):
    return 1 - (1 - start) * (1 + jnp.cos(math.pi * number / steps)) / 2

  return at_update


def large_views(batch: Mapping[str, Any]) -> dict[str, Any]:
  """A batch with its large views alone."""
  return {**batch, 'views': batch['views'][:, :1]}


def told_of(outputs: Mapping[str, jax.Array]) -> jax.Array:
  """What the teacher's outputs for a whole batch say."""
  return balanced(outputs['logits'])


# ---- The task.


def rows(
  config, pretrained, source, training: bool, facts: Facts = NO_FACTS
) -> tuple[Any, Callable]:
  """(images with the label 0, the function that makes views of one); see `images.rows`."""
  numbered, _ = images.rows(config, pretrained, source, training, facts)
  made = data.views_transform(
    **pretrained.preprocess,
    small=config.pretraining.crops,
    flip=config.data.augment in FLIPPED,
  )
  return numbered, made


def example(config, pretrained, outputs: int = 0) -> dict[str, np.ndarray]:
  """A batch of views of one empty image."""
  found = images.example(config, pretrained, outputs)
  views = np.zeros((1, 1 + config.pretraining.crops, *found['image'].shape[1:]), np.float32)
  return found | {'views': views}


def tally(outputs, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
  """Sums over the images of a batch, which the model itself teaches."""
  kept = mask.astype(jnp.float32)
  told = balanced(outputs['logits'][:, :2], kept)
  return {'loss': (losses(outputs['logits'], told) * kept).sum(), 'images': kept.sum()}


DINO = Task(
  images.source,
  rows,
  example,
  tally,
  images.scores,
  check=images.check,
  head=None,
  outputs=images.no_outputs,
  objective=images.objective,
  parts=parts,
  teacher=Teacher(momentum, large_views, told_of),
)
