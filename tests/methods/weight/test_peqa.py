"""PEQA: vectors and counts of the paper, gradients against the dense kernel's, what stays and what
is swapped.
"""

import functools
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft import models
from jpeft.core import count
from jpeft.models import Llama
from jpeft.quant import Quantized
from tests.fixtures import noisy
from tests.models.test_llama import LLAMA_2_7B
from tests.params import fast_if

TOKENS = jnp.array([[3, 9, 4, 1], [8, 2, 2, 5]])
FORMS = (jpeft.affine(), jpeft.affine(32, bits=3), jpeft.nf4(double=True), jpeft.int4())


def boxes(tree):
  return [
    x
    for x in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Quantized))
    if isinstance(x, Quantized)
  ]


def plain(tree):
  decode = lambda x: x.unbox() if isinstance(x, Quantized) else x
  return jax.tree.map(decode, tree, is_leaf=lambda x: isinstance(x, Quantized))


@functools.cache
def attached(form, scan=True):
  model = Llama(width=64, depth=2, heads=4, mlp_dim=128, vocab=13, scan=scan)
  held = noisy(jax.jit(model.init)(jax.random.key(0), TOKENS), 0.1)
  held = jpeft.quantize(model, form, held, TOKENS)
  tuned = jpeft.attach(model, jpeft.peqa(), held, TOKENS)
  return tuned, jax.jit(tuned.init)(jax.random.key(0), held), held


def test_the_vector_of_the_card():
  form = jpeft.affine(bits=2)
  held = {'params': {'kernel': jnp.array([-1, 0.5, 0.25, 2])[:, None]}}
  model, x = nn.Dense(1, use_bias=False), jnp.array([[1.0, 2, 3, 4]])
  small = jpeft.quantize(model, form, held, x, targets='')
  (box,) = boxes(small)
  arrays = {n: np.asarray(a).tolist() for n, a in box.arrays.items()}
  assert arrays == {'codes': [[0 | 1 << 4], [1 | 3 << 4]], 'absmax': [[1.0]], 'zero': [[1]]}
  np.testing.assert_array_equal(box.unbox()[:, 0], [-1, 0, 0, 2])
  tuned = jpeft.attach(model, jpeft.peqa(targets=''), small, x)
  theta = jax.jit(tuned.init)(jax.random.key(0), small)
  slope = jax.grad(lambda t: tuned.apply(t, small, x).sum())(theta)
  np.testing.assert_array_equal(slope['peqa']['']['kernel'], [[7]])


@pytest.mark.parametrize(
  ('sizes', 'block', 'numbers'),
  (
    ({}, None, 1_359_872),
    ({}, 128, 50_593_792),
    (
      {
        'hidden_size': 5120,
        'intermediate_size': 13824,
        'num_hidden_layers': 40,
        'num_attention_heads': 40,
        'num_key_value_heads': 40,
      },
      None,
      2_129_920,
    ),
  ),
)
def test_counts_are_the_papers(sizes, block, numbers):
  model = models.from_config({**LLAMA_2_7B, **sizes}, scan=True)
  tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  held = jax.eval_shape(
    lambda key: jpeft.quantize(
      model, jpeft.affine(block), model.init(key, jnp.zeros((1, 8), int)), tokens
    ),
    jax.random.key(0),
  )
  assert count(jpeft.attach(model, jpeft.peqa(), held, tokens).shapes) == numbers


@pytest.mark.parametrize('shape', ((64, 48), (33, 7), (1, 5)))
@pytest.mark.parametrize('form', (jpeft.affine(), jpeft.affine(32), jpeft.affine(bits=3)), ids=str)
def test_rounding_is_to_the_nearest_and_keeps_zero(form, shape):
  w = jax.random.normal(jax.random.key(0), shape) + 0.5
  w = w.at[0, 0].set(0).at[:, 1].set(0).at[:, 2].set(jnp.abs(w[:, 2]) + 1)
  arrays = form.encode(w)
  back = np.asarray(form.decode(arrays, shape))
  scale = (
    form.block
    and not form.aligned(shape)
    and arrays['absmax'].max()
    or np.repeat(arrays['absmax'], shape[0] // arrays['absmax'].shape[0], 0)
  )
  assert (np.abs(back - w) <= scale / 2 * 1.0001).all()
  assert back[0, 0] == 0 and not back[:, 1].any()
  block = form.block or shape[0]
  assert len(np.unique(back[:block, 0])) <= 2**form.bits or not form.aligned(shape)


@pytest.mark.parametrize(
  ('form', 'scan'),
  fast_if(
    lambda *case: case == (FORMS[1], True), itertools.product(FORMS, (True, False)), '{}-{}'.format
  ),
)
def test_it_starts_as_the_quantized_model_and_its_gradient_is_the_dense_ones(form, scan):
  tuned, theta, held = attached(form, scan)
  loss = lambda out: jnp.sum(jnp.sin(out))
  dense = plain(held)
  out, got = jax.jit(jax.value_and_grad(lambda t: loss(tuned.apply(t, held, TOKENS))))(theta)
  want, grads = jax.jit(jax.value_and_grad(lambda d: loss(tuned.model.apply(d, TOKENS))))(dense)
  assert float(out) == pytest.approx(float(want), rel=1e-5)
  flat = {
    path: x
    for path, x in jax.tree_util.tree_leaves_with_path(
      held, is_leaf=lambda x: isinstance(x, Quantized)
    )
    if isinstance(x, Quantized)
  }
  grads = dict(jax.tree_util.tree_leaves_with_path(grads))
  assert len(flat) == 7 * (1 if scan else 2)
  for path, box in flat.items():
    site = '/'.join(k.key for k in path[1:-1])
    g, scales = np.asarray(got['peqa'][site]['kernel']), theta['peqa'][site]['kernel']
    levels = (
      np.asarray(box.unbox()).reshape(*g.shape[:-1], -1, g.shape[-1])
      / np.asarray(scales)[..., None, :]
    )
    by_hand = (np.asarray(grads[path]).reshape(levels.shape) * levels).sum(-2)
    np.testing.assert_allclose(g, by_hand, atol=2e-4 * np.abs(by_hand).max())


def test_other_scales_on_the_same_integers():
  tuned, theta, held = attached(jpeft.affine())
  run = jax.jit(lambda t: tuned.apply(t, held, TOKENS))
  tasks = [jax.tree.map(lambda x, f=f: f * x, theta) for f in (1.0, 1.1)]
  outs = [np.asarray(run(t)) for t in tasks]
  assert np.abs(outs[0] - outs[1]).max() > 1e-3
  for t, out in zip(tasks, outs, strict=True):
    merged = jax.jit(tuned.merge)(t, held)
    assert jax.tree.structure(merged) == jax.tree.structure(held)
    for new, old in zip(boxes(merged), boxes(held), strict=True):
      for n in ('codes', 'zero'):
        np.testing.assert_array_equal(new.arrays[n], old.arrays[n])
    np.testing.assert_allclose(tuned.model.apply(merged, TOKENS), out, atol=1e-5)


@pytest.mark.parametrize('scan', (True, False))
def test_no_kernel_is_kept_for_the_backward_pass(scan):
  tuned, _, held = attached(jpeft.affine(), scan)
  residuals = jax.eval_shape(
    lambda t: jax.vjp(lambda t: tuned.apply(t, held, TOKENS), t)[1], tuned.shapes
  )
  kernels = {box.leaf.shape for box in boxes(held)}
  wide = [x.shape for x in jax.tree.leaves(residuals) if jnp.issubdtype(x.dtype, jnp.floating)]
  assert len(wide) > 5 and not [s for s in wide if s[-2:] in kernels and math.prod(s) > 64 * 64 - 1]


def test_kernels_without_scales_are_told():
  model = Llama(width=64, depth=2, heads=4, mlp_dim=96, vocab=13)
  held = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
  with pytest.raises(
    ValueError, match="peqa: 'kernel' at 'decoder/block_0/attention/query' has no scales"
  ):
    jpeft.attach(model, jpeft.peqa(), held, TOKENS)
