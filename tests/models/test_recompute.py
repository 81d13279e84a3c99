"""Blocks that run again from inputs in few bits: remat='packed' and 'packed4'."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.models import ViT

IMAGES = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype('float32')
LORA = jpeft.chain(jpeft.lora(rank=2, targets='{linear}'), jpeft.tune('{head}'))
# Of all gradients together, by the norm: the bounds of `residuals.compressed` too.
BOUNDS = {'packed': 0.01, 'packed4': 0.12}


def vit(scan, remat, **fields):
  # 65 tokens: groups of tokens, see `residuals.codes.encode`.
  return ViT(
    width=128,
    depth=3,
    heads=2,
    mlp_dim=256,
    patch_size=4,
    image_size=32,
    num_classes=4,
    scan=scan,
    remat=remat,
    **fields,
  )


@functools.cache
def result(scan, remat, method=LORA, dropout=0.0):
  """(loss, gradients as one vector) of a ViT with a method whose theta is not zero."""
  model = vit(scan, remat, dropout=dropout)
  variables = model.init(jax.random.key(0), IMAGES[:1])
  tuned = jpeft.attach(model, method, variables, IMAGES[:1])
  theta = tuned.init(jax.random.key(1), variables)
  theta = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(2), x.shape), theta)

  def loss(theta):
    options = {}
    if dropout:
      options = {'deterministic': False, 'rngs': {'dropout': jax.random.key(3)}}
    return jnp.square(tuned.apply(theta, variables, IMAGES, **options)).sum()

  value, gradient = jax.jit(jax.value_and_grad(loss))(theta)
  return float(value), np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradient)])


def far(found, wanted) -> float:
  return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize('remat', BOUNDS)
@pytest.mark.parametrize('scan', [False, True])
def test_the_output_is_the_same_and_the_gradient_near(scan, remat):
  value, gradient = result(scan, remat)
  plain, exact = result(scan, True)
  assert value == pytest.approx(plain, rel=1e-6)
  assert 0 < far(gradient, exact) < BOUNDS[remat]


def test_dropout_is_the_same_when_blocks_run_again():
  value, gradient = result(True, 'packed', dropout=0.3)
  plain, exact = result(True, True, dropout=0.3)
  assert plain != pytest.approx(result(True, True)[0], rel=1e-3)
  assert value == pytest.approx(plain, rel=1e-6)
  assert far(gradient, exact) < 0.05  # by another mask it would be about 1


def test_a_side_network_reads_what_blocks_record():
  method = jpeft.lst(reduction=4)
  value, gradient = result(True, 'packed', method)
  plain, exact = result(True, False, method)
  assert value == pytest.approx(plain, rel=1e-5)
  assert far(gradient, exact) < 1e-5  # no gradient crosses a block


def kept(remat) -> list[jax.Array]:
  """What the backward pass of a ViT stores beside weights."""
  model = vit(False, remat)
  variables = model.init(jax.random.key(0), IMAGES[:1])
  _, vjp = jax.vjp(lambda x: model.apply(variables, x), IMAGES)
  return jax.tree.leaves(vjp)


@pytest.mark.parametrize(('remat', 'bits'), [('packed', 8), ('packed4', 4)])
def test_what_is_kept_of_a_block(remat, bits):
  """Of a block its input: codes, and two numbers a feature of each image."""
  images, tokens, width = len(IMAGES), 65, 128
  stored = kept(remat)
  coded = sum(x.nbytes for x in stored if x.dtype in (jnp.uint8, jnp.bfloat16))
  assert coded == 3 * images * width * (tokens * bits / 8 + 2 * 2)

  def whole(arrays) -> int:
    return sum(x.shape == (images, tokens, width) and x.dtype == jnp.float32 for x in arrays)

  assert whole(kept(True)) - whole(stored) == 3
