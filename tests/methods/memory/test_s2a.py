"""S2A: counts, what is stored, gradients beside those of plain backprop, with other methods."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.methods.memory.s2a import packed, s2a
from jpeft.models.llama import Llama
from jpeft.models.nn.blocks import Encoder, PreNormBlock
from jpeft.models.vit.model import ViT
from tests.contract.anatomies import described
from tests.fixtures import BACKBONES, noisy
from tests.kept import residuals
from tests.params import fast_if

VIT_B = ViT(
  image_size=224, patch_size=16, width=768, depth=12, heads=12, mlp_dim=3072, num_classes=None
)
IMAGES = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)


def count(**hp) -> int:
  held = jax.eval_shape(VIT_B.init, jax.random.key(0), IMAGES)
  return jpeft.count(jpeft.attach(VIT_B, s2a(**hp), held, IMAGES).shapes)


def test_the_counts_of_a_vit_b():
  biases, places, d = 83_712 + 19_200, 197, 768
  assert count(rank=0, side=0) == biases == 102_912
  assert count(rank=4, side=0, biases=None) == 12 * 4 * (places + d)
  assert count(rank=0, side=16, pool=6, biases=None) == 12 * 16 * (d // 6 + d)
  assert 0.0085 < count() / 85.8e6 < 0.0095


B, N, D = 4, 24, 128
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, N, D)), jnp.float32)
ROLES = jpeft.Anatomy(
  'bare encoder',
  {
    'block': r'block(?:s|_\d+)',
    'linear': r'block.*/(?:query|key|value|out|fc[12])',
    'head': 'head',
  },
)


@pytest.fixture(autouse=True)
def roles():
  before = dict(jpeft.ANATOMIES)
  jpeft.register_anatomy(ROLES)
  yield
  jpeft.ANATOMIES.clear()
  jpeft.ANATOMIES.update(before)


@functools.cache
def run(method: str, stack: str = ''):
  """(output, gradients, what is stored) of a method on an encoder of two blocks."""
  model = Encoder(
    functools.partial(PreNormBlock, 2, D // 2, 4 * D), 2, 'scan' in stack, 'remat' in stack
  )
  held = noisy(model.init(jax.random.key(1), X), 0.05)
  method = METHODS[method]
  tuned = jpeft.attach(model, method, held, X)
  theta = noisy(tuned.init(jax.random.key(2), held), 0.05)
  g = jax.random.normal(jax.random.key(3), X.shape)

  def both(theta, held):
    out, vjp = jax.vjp(lambda theta: tuned.apply(theta, held, X), theta)
    return out, vjp(g)[0]

  return *jax.jit(both)(theta, held), residuals(
    tuned.apply, theta, held, X, weights=(held, theta), given=False
  )


METHODS = {
  'bitfit': jpeft.bitfit(),
  'lora': jpeft.lora(4, targets='{linear}'),
  'lora+adapter': jpeft.chain(
    jpeft.lora(4, targets='{linear}'), jpeft.houlsby(4, targets='block.*/(?:out|fc2)')
  ),
}
METHODS |= {f'{name} packed': jpeft.chain(method, packed()) for name, method in METHODS.items()}
METHODS['lora recomputed'] = jpeft.chain(METHODS['lora'], packed(recompute=True))
METHODS |= {'prompts': s2a(side=0), 's2a': s2a(side=8), 's2a 8 bits': s2a(side=8, bits=8)}


def far(got, want) -> float:
  flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
  return float(np.linalg.norm(flat(got) - flat(want)) / np.linalg.norm(flat(want)))


DIAGONAL = ('bitfit', ''), ('lora', 'scan'), ('lora+adapter', 'scan remat')


@pytest.mark.parametrize(
  'method, stack',
  fast_if(
    lambda *pair: pair in DIAGONAL,
    itertools.product(['bitfit', 'lora', 'lora+adapter'], ['', 'scan', 'scan remat']),
  ),
)
def test_the_output_is_exact_and_the_gradient_near(method, stack):
  out, grads, _ = run(method, stack)
  same, near, _ = run(f'{method} packed', stack)
  np.testing.assert_allclose(same, out, atol=1e-5)
  assert 1e-4 < far(near, grads) < 0.08
  assert jax.tree.structure(near) == jax.tree.structure(grads)


@pytest.mark.parametrize('method', ['bitfit packed', 'prompts', 's2a'])
@pytest.mark.parametrize('stack', ['', 'scan'])
def test_no_wide_float_is_kept(method, stack):
  """No [B, N, D] of floats; in a block 3 values of 8 bits, 6 of 4, and scales."""
  *_, kept = run(method, stack)
  assert not [x.shape for x in kept if jnp.issubdtype(x.dtype, jnp.floating) and x.size >= X.size]
  codes = jpeft.nbytes([x for x in kept if x.dtype == jnp.uint8])
  assert codes <= 2 * X.size * (3 + 6 / 2) + (2 * B * N * 8 if method == 's2a' else 0)


@pytest.mark.parametrize('stack', ['', 'scan'])
def test_of_blocks_that_run_again_the_input_is_kept(stack):
  """Codes of 4 bits of the second block's input: no gradient of LoRA asks for that of the first."""
  out, grads, _ = run('lora', stack)
  same, near, kept = run('lora recomputed', stack)
  np.testing.assert_allclose(same, out, atol=1e-5)
  assert 1e-4 < far(near, grads) < 0.12
  codes = jpeft.nbytes([x for x in kept if x.dtype == jnp.uint8])
  blocks = 2 if stack else 1  # a scan stores of all blocks alike
  assert codes == blocks * X.size // 2


def test_a_plain_step_keeps_ten_times_as_much():
  plain, less = (jpeft.nbytes(run(name)[2]) for name in ('bitfit', 'bitfit packed'))
  assert less < plain / 8


def test_eight_bits_are_nearer_than_four():
  four, eight = (run(name)[1] for name in ('s2a', 's2a 8 bits'))
  assert 1e-4 < far(four, eight) < 0.08


@pytest.mark.parametrize(
  'name', fast_if(lambda name: name != 'nnx_vit', ['linen_vit_scan', 'nnx_vit', 'nnx_llama'])
)
def test_dropout_and_foreign_models(name):
  b = BACKBONES[name]
  held, key = b.backbone, {'dropout': jax.random.key(7)}
  kwargs = {**b.kwargs, **b.train_kwargs, **({'rngs': key} if b.rngs_names else {})}

  def grads(method):
    with described(b):
      tuned = jpeft.attach(b.train_model, method, held, *b.args, **b.kwargs)
    theta = noisy(tuned.init(jax.random.key(2), held), 0.05)
    fn = lambda theta: sum(
      jnp.square(y).sum() for y in jax.tree.leaves(tuned.apply(theta, held, *b.args, **kwargs))
    )
    return jax.jit(jax.value_and_grad(fn))(theta)

  def pure(t, call, *args, **kwargs):  # which draws the dropout masks that `packed` draws
    fn, arrays = call.pure()
    return fn(arrays, *args, **kwargs)

  base = jpeft.lora(2, targets='{q}|{fc1}')
  plain = jpeft.chain(base, jpeft.at('{block}', jpeft.Call('packed', pure)))
  value, want = grads(plain)
  # Over draws of theta 0.007 to 0.02. Run again from its input, a block's norm also enlarges the
  # rounding of tokens that are small beside others of their group, as in this ViT of width 16.
  for recompute, bound in ((False, 0.03), (True, 0.1)):
    same, near = grads(jpeft.chain(base, packed(bits=8, recompute=recompute)))
    np.testing.assert_allclose(same, value, rtol=1e-5)
    assert 0 < far(near, want) < bound


def test_bad_hyperparameters_and_places():
  with pytest.raises(ValueError, match='s2a: rank=-1 must be a whole number, at least 0'):
    s2a(rank=-1)
  with pytest.raises(ValueError, match='4 or 8 bits, not 3'):
    packed(bits=3)
  model = Encoder(functools.partial(PreNormBlock, 2, D // 2, 4 * D), 1)
  held = jax.jit(model.init)(jax.random.key(1), X)
  with pytest.raises(ValueError, match="pool=5 does not divide the width 128 of 'block_0'"):
    jpeft.attach(model, s2a(pool=5), held, X)
  tuned = jpeft.attach(model, s2a(side=4), held, X)
  theta = jax.jit(tuned.init)(jax.random.key(0), held)
  assert tuned.apply(theta, held, X[:, :9]).shape == (B, 9, D)
  with pytest.raises(
    ValueError, match="prompts of 'block_0' are for 24 places, and its input has 48"
  ):
    tuned.apply(theta, held, jnp.concatenate([X, X], 1))
  b = BACKBONES['linen_cnn']
  with pytest.raises(ValueError, match='a stream that keeps its shape .* use rank=0, side=0'):
    jpeft.attach(b.model, s2a(blocks=r'block_\d+', biases=None), b.backbone, *b.args, **b.kwargs)


def test_a_model_without_biases_is_told_the_way_out():
  model = Llama(width=32, depth=2, heads=4, mlp_dim=64, vocab=50)
  tokens = jax.ShapeDtypeStruct((2, 6), jnp.int32)
  held = jax.eval_shape(model.init, jax.random.key(0), tokens)
  with pytest.raises(ValueError, match='a model without biases takes biases=None'):
    jpeft.attach(model, jpeft.s2a(), held, tokens)
