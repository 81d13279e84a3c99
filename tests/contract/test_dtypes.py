"""Half precision: in the parameters, in the computation, never in theta and its gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jpeft
from tests.contract.anatomies import described
from tests.contract.pair import far, pair_of
from tests.contract.table import DEFAULT, SERVED, made, one_each, over, stored
from tests.fixtures import BACKBONES, plain

HALF = jnp.bfloat16
CAST = ('linen_vit_scan', 'linen_gemma', 'nnx_vit_scan')
CHOSEN = [p for p in SERVED if p[1] in CAST]
SCANNED = [p for p in SERVED if p[1] == 'linen_vit_scan']
default = lambda pairs: [p for p in pairs if p in DEFAULT]
names = lambda pairs, always: over(pairs, always, fixture='names')


@functools.cache
def variant(name: str, param_dtype):
  return BACKBONES.build(name, dtype=HALF, param_dtype=param_dtype)


def attached(method: str, b):
  b = stored(method, b)
  with described(b):
    tuned = jpeft.attach(b.model, made(method, b.name), b.backbone, *b.args, **b.kwargs)

  def loss(theta):
    out = tuned.apply(theta, b.backbone, *b.args, **b.kwargs)
    return jnp.sum(jnp.square(out.astype(jnp.float32))), out

  def gradient(theta):
    trained, held = tuned.split(theta)
    return jax.grad(lambda trained: loss(tuned.join(trained, held)), has_aux=True)(trained)

  return tuned, gradient


@names(CHOSEN, always=one_each(CHOSEN)[::6])
def test_dtypes_in_half_precision(names):
  check(*names, HALF)


@names(CHOSEN, always=one_each(CHOSEN)[3::6])
def test_dtypes_where_the_computation_alone_is_in_half_precision(names):
  check(*names, jnp.float32)


def check(method: str, name: str, param_dtype):
  b = variant(name, param_dtype)
  tuned, grad = attached(method, b)
  trained, _ = tuned.split(tuned.shapes)
  assert {x.dtype for x in jax.tree.leaves(trained)} == {jnp.dtype('float32')}
  grads, out = jax.eval_shape(grad, tuned.shapes)
  assert grads == trained
  assert out == jax.eval_shape(lambda: plain(b)) and out.dtype == HALF


@names(SCANNED, always=default(SCANNED)[::3])
def test_numbers_in_half_precision(names):
  b = variant(names[1], HALF)
  _, grad = attached(names[0], b)
  theta, want, _ = pair_of(*names).moved
  grads, out = jax.jit(grad)(theta)
  assert far(out, want) < 0.15
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
