"""MAE: images alone, of which most patches are hidden and their pixels are to be told.

He et al., "Masked Autoencoders Are Scalable Vision Learners", 2021 (arXiv 2111.06377). Of the N
patches of an image, hidden ones h and shown ones:

  tokens   = encoder(embed(image) without the tokens of h)
  pixels   = decoder(tokens, a learned token in the places of h)      [N, patch height * width * 3]
  loss     = mean over h and the numbers of a patch of (pixels - target)^2
  target   = (patch - its mean) / its deviation

The tokens of hidden patches leave the sequence behind the embedding, where positions are added
already: blocks run on the others alone, so that a step costs about a quarter of the blocks' FLOPs.
A backbone whose blocks know patches by their numbers (rotary positions, a bias of distances,
windows) cannot run on some of them, and is refused.

Which patches are hidden is drawn on the device, anew for each image and step; an evaluation hides
the same ones each time. The decoder is trained from scratch beside the method and dropped at the
end. Deviations: it is smaller than the published one (8 blocks of width 512), which
`pretraining.depth` and `pretraining.width` give back.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jpeft import models
from jpeft.core import Call, Method, Site, at, chain
from jpeft.methods import on_first

from . import images
from .task import Task

NAME = 'mae'
WIDTH, DEPTH = 256, 4  # of the decoder
HEAD = 32  # size of an attention head there


def parts(config, pretrained) -> Method:
  """The decoder, and what hides patches from the backbone."""
  chosen = config.pretraining
  return mae(chosen.hidden, chosen.width or WIDTH, chosen.depth or DEPTH)


def mae(hidden: float = 0.75, width: int = WIDTH, depth: int = DEPTH) -> Method:
  """Turns a model of images into one that tells the pixels of hidden patches.

  Called with images [B, H, W, 3] it returns {'losses': [B], 'pixels': [B, N, numbers of a patch]}.
  `hidden=` of the call says which patches are hidden, bool [B, N] with round(hidden N) in each row;
  they are drawn where it is left out.

  Args:
    hidden: the share of the patches that is hidden.
    width: of the decoder; a multiple of 32.
    depth: number of its blocks.

  Raises:
    ValueError: a number outside its range; at `attach`, a model without a grid of patches; at the
      call, a model that cannot run on some of its patches.
  """
  if not 0 < hidden < 1:
    raise ValueError(f'mae: hidden={hidden!r} must lie between 0 and 1')
  if width < 1 or width % HEAD or depth < 1:
    raise ValueError(
      f'mae: the decoder has a width that is a multiple of {HEAD} and at least one block, not '
      f'width={width}, depth={depth}'
    )
  rules = _Mae(hidden, width, depth)
  return chain(
    at('', Call(NAME, rules.model, rules.init, merge=images.not_merged, takes=('hidden',))),
    at('{stack}|{final_norm}', Call(NAME, rules.module, merge=images.not_merged)),
  )


@dataclasses.dataclass(frozen=True, eq=False)
class _Mae:
  """The rules of `mae`; the fields are its arguments."""

  hidden: float
  width: int
  depth: int

  def hidden_of(self, patches: int) -> int:
    """How many patches are hidden: at least one, and not all."""
    return min(max(round(self.hidden * patches), 1), patches - 1)

  def decoder(self, site: Site, dtype: Any = jnp.float32) -> 'models.PatchDecoder':
    grid, pixels = grid_of(site)
    numbers = math.prod(pixels) * site.model[''].input.shape[-1]
    heads = self.width // HEAD
    return models.PatchDecoder(self.width, self.depth, heads, grid, numbers, dtype=dtype)

  def init(self, key, site: Site, arrays) -> dict:
    decoder = self.decoder(site)
    patches = math.prod(decoder.grid)
    norm = site.model.find('{final_norm}')[0]
    shown = jnp.zeros((1, patches - self.hidden_of(patches)), int)
    tokens = jnp.zeros((1, shown.shape[1] + 1, norm.out.shape[-1]))
    return {'decoder': decoder.init(key, tokens, shown)['params']}

  def model(self, t, call, images, *args, hidden=None, **kwargs):
    """The loss of each image, and the pixels that are told."""
    grid, size = grid_of(call.site)
    patches = math.prod(grid)
    if hidden is None:
      hidden = self.drawn(call, len(images), patches)
    if hidden.shape != (len(images), patches):
      raise ValueError(
        f'mae: hidden= is {list(hidden.shape)}, and there are {len(images)} images of {patches} '
        'patches'
      )
    shown = jnp.argsort(hidden, axis=1, stable=True)[:, : patches - self.hidden_of(patches)]
    call.local.update(shown=shown, patches=patches)
    self.run(call, images, *args, **kwargs)
    tokens = call.local['tokens']
    with call.outside():
      decoder = self.decoder(call.site, tokens.dtype)
      pixels = decoder.apply({'params': t['decoder']}, tokens, shown)
    target = normalised(patches_of(images.astype(jnp.float32), grid, size))
    squares = jnp.square(pixels.astype(jnp.float32) - target).mean(-1)  # [B, N]
    losses = jnp.where(hidden, squares, 0).sum(1) / self.hidden_of(patches)
    return {'losses': losses, 'pixels': pixels}

  def run(self, call, *args, **kwargs) -> None:
    """Runs the model on the patches that are shown.

    Raises:
      ValueError: it cannot.
    """
    try:
      call(*args, **kwargs)
    except (TypeError, ValueError) as error:
      of_places = ('shapes', 'knows the positions of')
      if not any(part in str(error) for part in of_places):  # something else, which says so itself
        raise
      raise ValueError(
        'mae: the blocks of this model run on all patches of an image alone, as they know patches '
        'by their numbers (rotary positions, a bias of distances, windows); take a backbone whose '
        f'positions are added to the tokens. It says: {str(error).splitlines()[0]:.200}'
      ) from error

  def drawn(self, call, examples: int, patches: int) -> jax.Array:
    """Which patches are hidden, bool [examples, patches]."""
    key = call.rng('hidden patches')
    if key is None:  # of an evaluation
      key = jax.random.key(0)
    order = jnp.argsort(jax.random.uniform(key, (examples, patches)), axis=1)
    return jnp.argsort(order, axis=1) < self.hidden_of(patches)

  def module(self, t, call, *args, **kwargs):
    """Tokens of hidden patches leave at the first module of the stack; the last norm is read."""
    stack = call.site.model.find('{stack}')
    if call.site.path == stack[0].path:
      return self.shortened(call, *args, **kwargs)
    out = call(*args, **kwargs)
    if call.site.path == call.site.model.find('{final_norm}')[0].path:
      call.root['tokens'] = call.site.stream(out)
    return out

  def shortened(self, call, *args, **kwargs):
    """Runs the first module of the stack; what runs behind it has the patches that are shown."""
    shown = call.root['shown']

    def visible(x):
      lead = x.shape[1] - call.root['patches']
      kept = jnp.take_along_axis(x[:, lead:], shown[..., None], 1)
      return jnp.concatenate([x[:, :lead], kept], 1)

    path = call.site.path
    if any(other.startswith(f'{path}/') for other in call.site.model):
      args, kwargs = on_first(call, args, kwargs, visible)
      return call(*args, **kwargs)
    # One that runs no others, such as a position embedding, reads the whole grid.
    return call.site.map_stream(call(*args, **kwargs), visible)


# ---- Patches.


def grid_of(site: Site) -> tuple[tuple[int, int], tuple[int, int]]:
  """((rows, columns) of the patches of a model, (height, width) of one in pixels).

  Raises:
    ValueError: the model does not make a grid of patches of images.
  """
  read = site.model[''].input
  made = [found.out for found in site.model.find('{patch}') if found.out is not None]
  if read is None or len(read.shape) != 4 or not made or len(made[0].shape) != 4:
    raise ValueError(
      'mae: patches are hidden where a layer {patch} makes a grid of them, [B, rows, columns, D], '
      'of images [B, height, width, 3]; this model has none'
    )
  grid = made[0].shape[1:3]
  return grid, (read.shape[1] // grid[0], read.shape[2] // grid[1])


def patches_of(images: jax.Array, grid: tuple[int, int], size: tuple[int, int]) -> jax.Array:
  """Images [B, H, W, C] as rows of pixels, [B, N, height * width * C]."""
  rows, columns = grid
  height, width = size
  cut = images.reshape(len(images), rows, height, columns, width, -1)
  return cut.transpose(0, 1, 3, 2, 4, 5).reshape(len(images), rows * columns, -1)


def normalised(patches: jax.Array) -> jax.Array:
  """Each patch less its mean, over its deviation."""
  mean = patches.mean(-1, keepdims=True)
  variance = patches.var(-1, keepdims=True, ddof=1)
  return (patches - mean) / jnp.sqrt(variance + 1e-6)


# ---- The task.


def tally(outputs, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
  """Sums over the images of a batch."""
  kept = mask.astype(jnp.float32)
  return {'loss': (outputs['losses'] * kept).sum(), 'images': kept.sum()}


MAE = Task(
  images.source,
  images.rows,
  images.example,
  tally,
  images.scores,
  check=images.check,
  head=None,
  outputs=images.no_outputs,
  objective=images.objective,
  parts=parts,
)
