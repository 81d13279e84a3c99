"""Models of a few units for the tests of the side methods."""

import jax
import jax.numpy as jnp

import jpeft
from jpeft.models import T5, ViT
from tests.fixtures import noisy

TOKENS = jnp.arange(12).reshape(2, 6)
MASK = jnp.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
IMAGES = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))


def vit(**fields):
  """(a ViT of three blocks, width 32, five tokens; its weights)."""
  model = ViT(
    **{
      **dict(width=32, depth=3, heads=4, mlp_dim=64, patch_size=4, image_size=8, num_classes=5),
      **fields,
    }
  )
  return model, noisy(_held(model, 1, IMAGES), 0.05)


def t5(**fields):
  """(a T5 of two and two blocks, width 32; its weights)."""
  model = T5(**{**dict(width=32, depth=2, heads=4, mlp_dim=64, vocab=50, head_dim=8), **fields})
  return model, _held(model, 0, TOKENS, TOKENS)


_KNOWN = {}


def _held(model, seed: int, *args):
  """What the model holds at first, made once a process."""
  if (model, seed) not in _KNOWN:
    _KNOWN[model, seed] = jax.jit(model.init)(jax.random.key(seed), *args)
  return jax.tree.map(lambda x: x, _KNOWN[model, seed])


def attached(model, held, method, *args, **kwargs):
  """(tuned, a theta off its start)."""
  tuned = jpeft.attach(model, method, held, *args, **kwargs)
  return tuned, noisy(jax.jit(tuned.init)(jax.random.key(0), held))


def shapes_of(model, method, *args, **kwargs):
  """tuned of a model of any size, from shapes."""
  return jpeft.attach(
    model, method, jax.eval_shape(model.init, jax.random.key(0), *args), *args, **kwargs
  )
