"""Attention by rows: equal to that of whole scores, which it never makes."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jpeft
from jpeft import planning, programs, training
from jpeft.core import TokenMask, dot_product, dot_product_attention, heads_over
from jpeft.models import Llama
from jpeft.planning.work import Work
from tests.fixtures import noisy
from tests.traced import variables_of

BATCH, LENGTH, HEADS, SIZE = 2, 13, 4, 4
TEXTS = jnp.array([[1] * 5 + [2] * 6 + [0] * 2, [0] * 3 + [1] * 10])
PLACES = jnp.arange(LENGTH)


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture
def by_rows(monkeypatch):
  """Every context is long, and no piece has all rows."""
  monkeypatch.setattr(dot_product, 'LONG', 0)
  monkeypatch.setattr(dot_product, 'MOST_SCORES', 100)


BIASES = {
  'none': None,
  'of heads': normal(3, 1, HEADS, LENGTH, LENGTH),
  'of pairs': normal(3, LENGTH, LENGTH),
  'of keys': normal(3, BATCH, 1, 1, LENGTH),
}
MASKS = {
  'none': None,
  'causal': TokenMask.of_row(LENGTH, None),
  'texts': TokenMask.of_row(LENGTH, TEXTS, causal=False),
  'window': TokenMask.of_row(LENGTH, TEXTS, window=4),
  'of keys': normal(4, BATCH, 1, 1, LENGTH) > -0.5,
  'of pairs': normal(4, BATCH, HEADS, LENGTH, LENGTH) > -0.5,
}
CASES = [('none', mask) for mask in MASKS] + [(bias, 'window') for bias in BIASES]


@pytest.mark.parametrize('key_heads', [1, 2, 4])
@pytest.mark.parametrize('bias,mask', CASES)
def test_equals_whole_scores(by_rows, bias, mask, key_heads):
  """Value and gradients of query, key, value and bias."""
  bias, mask = BIASES[bias], MASKS[mask]
  arrays = {
    'query': normal(0, BATCH, LENGTH, HEADS, SIZE),
    'key': normal(1, BATCH, LENGTH, key_heads, SIZE),
    'value': normal(2, BATCH, LENGTH, key_heads, SIZE),
    'bias': bias,
  }
  slope = normal(5, BATCH, LENGTH, HEADS, SIZE)

  def whole(arrays):
    key, value = (jnp.repeat(arrays[name], HEADS // key_heads, 2) for name in ('key', 'value'))
    full = None if mask is None else jnp.asarray(mask)
    out = nn.dot_product_attention(arrays['query'], key, value, arrays['bias'], full)
    return (out * slope).sum()

  def rows(arrays):
    return (dot_product_attention(**arrays, mask=mask) * slope).sum()

  want, found = (jax.jit(jax.value_and_grad(fn))(arrays) for fn in (whole, rows))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), found, want)


@pytest.mark.parametrize('key_heads', [2, 4])
@pytest.mark.parametrize('long', [False, True], ids=['short', 'long'])
def test_a_soft_cap_bends_logits_before_bias_and_mask(monkeypatch, long, key_heads):
  """Value and gradients equal those of the formula; in long contexts no scores are whole."""
  if long:
    monkeypatch.setattr(dot_product, 'LONG', 0)
    monkeypatch.setattr(dot_product, 'MOST_SCORES', 100)
  cap, bias, mask = 0.5, BIASES['of heads'], MASKS['window']
  arrays = {
    'query': normal(0, BATCH, LENGTH, HEADS, SIZE),
    'key': normal(1, BATCH, LENGTH, key_heads, SIZE),
    'value': normal(2, BATCH, LENGTH, key_heads, SIZE),
  }
  slope = normal(5, BATCH, LENGTH, HEADS, SIZE)

  def whole(arrays):
    key, value = (jnp.repeat(arrays[name], HEADS // key_heads, 2) for name in ('key', 'value'))
    logits = jnp.einsum('bnhk,bmhk->bhnm', arrays['query'], key) / SIZE**0.5
    logits = jnp.where(jnp.asarray(mask), cap * jnp.tanh(logits / cap) + bias, -jnp.inf)
    return (jnp.einsum('bhnm,bmhk->bnhk', jax.nn.softmax(logits), value) * slope).sum()

  def capped(arrays):
    return (dot_product_attention(**arrays, bias=bias, mask=mask, logit_cap=cap) * slope).sum()

  want, found = (jax.jit(jax.value_and_grad(fn))(arrays) for fn in (whole, capped))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), found, want)
  if long:
    shapes = [v.aval.shape for v in variables_of(jax.make_jaxpr(jax.grad(capped))(arrays).jaxpr)]
    scores = [shape for shape in shapes if shape[-2:] == (LENGTH, LENGTH)]
    assert all(shape == bias.shape for shape in scores), set(scores)  # that which is given


@pytest.mark.parametrize(
  'bias,mask,key_heads',
  [('of heads', 'window', 2), ('of keys', 'of pairs', 4), ('none', 'causal', 2)],
)
def test_each_device_of_a_mesh_attends_for_its_heads(by_rows, bias, mask, key_heads):
  """Value and gradients are those of one device, and nothing is gathered."""
  arrays = {
    'query': normal(0, BATCH, LENGTH, HEADS, SIZE),
    'key': normal(1, BATCH, LENGTH, key_heads, SIZE),
    'value': normal(2, BATCH, LENGTH, key_heads, SIZE),
  }
  slope = normal(5, BATCH, LENGTH, HEADS, SIZE)
  mesh = training.mesh(2, 2)

  def loss(arrays, bias, slope):
    return (dot_product_attention(**arrays, bias=bias, mask=MASKS[mask]) * slope).sum()

  def loss_on_mesh(*inputs):
    with heads_over(mesh, 'data', 'model'):
      return loss(*inputs)

  moved = 0 if bias == 'none' else (0, 1)
  want = jax.jit(jax.value_and_grad(loss, moved))(arrays, BIASES[bias], slope)
  by_heads = NamedSharding(mesh, PartitionSpec('data', None, 'model'))
  arrays, slope = jax.device_put((arrays, slope), by_heads)
  step = jax.jit(jax.value_and_grad(loss_on_mesh, moved))
  program = step.lower(arrays, BIASES[bias], slope).compile()
  found = program(arrays, BIASES[bias], slope)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), found, want)
  sent = programs.collectives(program, mesh.shape)
  assert all(one.kind == 'all-reduce' and not one.loops for one in sent), sent


def test_heads_that_do_not_divide_are_not_cut(by_rows):
  query = normal(0, BATCH, LENGTH, 3, SIZE)
  key = normal(1, BATCH, LENGTH, 1, SIZE)
  want = dot_product_attention(query, key, key)
  with heads_over(training.mesh(2, 2), 'data', 'model'):
    found = jax.jit(dot_product_attention)(query, key, key)
  np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)
  assert len(found.sharding.device_set) == 1


def test_dropout_is_that_of_its_rate(by_rows):
  ones = jnp.ones((BATCH, 64, HEADS, SIZE))
  options = {'dropout_rng': jax.random.key(0), 'dropout_rate': 0.25, 'deterministic': False}
  out = dot_product_attention(ones, ones, ones, broadcast_dropout=False, **options)
  same = dot_product_attention(ones, ones, ones, broadcast_dropout=False, **options)
  np.testing.assert_array_equal(out, same)
  assert abs(out.mean() - 1) < 0.01 and 0.05 < out.std() < 0.1  # sqrt(1/3 / 64) = 0.072
  numbers = jnp.broadcast_to(normal(0, 1, 64, 1, 1), ones.shape)
  attend = functools.partial(dot_product_attention, broadcast_dropout=False, **options)
  with heads_over(training.mesh(2, 2), 'data', 'model'):
    on_mesh = jax.jit(attend)(ones, ones, numbers)
  for out in (attend(ones, ones, numbers), on_mesh):
    assert len(np.unique(out[..., 0])) == BATCH * 64 * HEADS  # no two rows or heads draw alike


def test_a_token_mask_is_an_array_where_one_is_read():
  mask = TokenMask.of_row(LENGTH, TEXTS, window=3)
  whole = np.asarray(jnp.asarray(mask))
  places = np.arange(LENGTH)
  distance = places[:, None] - places
  want = (distance >= 0) & (distance < 3) & (TEXTS[:, :, None] == TEXTS[:, None])
  np.testing.assert_array_equal(whole[:, 0], want)
  assert mask.shape == whole.shape and mask.dtype == whole.dtype and mask.ndim == 4
  np.testing.assert_array_equal(jnp.where(mask, 1, 0), whole)
  np.testing.assert_array_equal(mask & (places > 4), whole & (places > 4))
  np.testing.assert_array_equal(mask[:1], whole[:1])
  more = jnp.asarray(mask.with_more(2))
  np.testing.assert_array_equal(
    more, np.pad(whole, ((0, 0),) * 3 + ((2, 0),), constant_values=True)
  )


METHODS = {
  'lora': jpeft.lora(2),
  'prefix': jpeft.prefix(3),
  'lst': jpeft.lst(2, block='attention'),
  'qst': jpeft.qst(2),
  'saved_bits': jpeft.make('lora', rank=2, saved_bits=8),
}


@pytest.mark.parametrize('scan,remat', [(False, False), (True, True)])
@pytest.mark.parametrize('name', METHODS)
def test_methods_on_long_contexts(name, scan, remat, monkeypatch):
  """The loss and its gradient are those of whole scores, on rows of two texts."""
  tokens = jax.random.randint(jax.random.key(0), (BATCH, LENGTH), 0, 50)
  model = Llama(16, 2, 4, 24, 50, kv_heads=2, window=6, scan=scan, remat=remat)
  variables = noisy(model.init(jax.random.key(1), tokens), 0.1)

  def loss_and_gradient():
    tuned = jpeft.attach(model, METHODS[name], variables, tokens, mask=TEXTS)
    theta = noisy(tuned.init(jax.random.key(2), variables))

    def loss(theta):
      out = tuned.apply(theta, variables, tokens, mask=TEXTS)
      return jnp.square(jnp.where((TEXTS > 0)[..., None], out, 0)).mean()

    return jax.jit(jax.value_and_grad(loss))(theta)

  want = loss_and_gradient()
  monkeypatch.setattr(dot_product, 'LONG', 0)
  monkeypatch.setattr(dot_product, 'MOST_SCORES', 100)
  found = loss_and_gradient()
  tolerance = 2e-2 if name == 'saved_bits' else 2e-5  # what is coded is not the same
  scale = max(float(abs(x).max()) for x in jax.tree.leaves(want))
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * scale),
    found,
    want,
  )


def square_buffers(program: str, length: int) -> set[str]:
  """The lines of a compiled program whose values have two axes of `length`, outside of fusions."""
  found = set()
  fused = False
  for line in program.splitlines():
    head = re.match(r'(?:ENTRY )?%?([\w.-]+) \(.*\{$', line)
    if head:
      fused = 'fused_computation' in head[1]
    made = re.match(r'\s+(?:ROOT )?%?[\w.-]+ = (.*?) [\w-]+\(', line)
    if fused or not made:
      continue
    for shape in re.findall(r'\w+\[([\d,]+)\]', made[1]):
      if shape.split(',').count(str(length)) > 1:
        found.add(line.strip())
  return found


def compiled_step(name, length, where):
  """A step of a method on one text, compiled for a TPU, and its temporary bytes."""
  model = Llama(256, 2, 8, 512, 1000, kv_heads=2, tied=True, scan=True, dtype=jnp.bfloat16)
  variables = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 8), jnp.int32))
  names = ('tokens', 'token_mask', 'label')

  def batch(size):
    return {name: jax.ShapeDtypeStruct((size, length), jnp.int32) for name in names}

  work = Work(model, variables, batch, 1)
  tuned = work.tuned(jpeft.make(name, head=False))
  tx = training.optim.optimizer(tuned, tuned.shapes, 1e-3)
  mesh = where.mesh()
  state = training.state_shapes(tuned, tx, variables)
  step = jax.jit(work.step(tuned, tx, mesh), donate_argnums=0)
  program = programs.compiled(step.trace(*work.placed(tuned, mesh, state, 1)), where.options)
  return program.as_text(), programs.memory(program).temp


@pytest.mark.aot
@pytest.mark.parametrize('name', ['lora', 'lst', 'qst'])
def test_no_scores_are_whole_on_a_tpu(name):
  """Nothing in a step is [.., 3072, 3072], and temporaries grow as the text does."""
  pytest.importorskip('libtpu')
  where = planning.target('tpu:v5e')
  program, small = compiled_step(name, 3072, where)
  assert not square_buffers(program, 3072)
  _, large = compiled_step(name, 12288, where)
  assert large < 4.3 * small
  everywhere = NamedSharding(where.mesh(), PartitionSpec())
  x = jax.ShapeDtypeStruct((1, 3072, 8, 32), jnp.bfloat16, sharding=everywhere)
  whole = jax.jit(nn.dot_product_attention).trace(x, x, x)
  assert square_buffers(programs.compiled(whole, where.options).as_text(), 3072)
