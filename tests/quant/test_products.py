"""Products of 4-bit models by kernels: the numbers, what is kept, vmap, meshes, what runs where."""

import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jpeft
import pallas_kernels
from jpeft import models, programs
from jpeft.core import noting
from jpeft.planning.devices import target
from jpeft.quant import Quantized
from tests.fixtures import noisy
from tests.params import fast_if

TINY = {
  'model_type': 'llama',
  'hidden_size': 256,
  'num_hidden_layers': 1,
  'num_attention_heads': 2,
  'intermediate_size': 256,
  'vocab_size': 64,
}
TOKENS = jnp.arange(16).reshape(2, 8)


@pytest.fixture(autouse=True)
def exact():
  """Products of float32 in full precision, as kernels make them."""
  with jax.default_matmul_precision('float32'):
    yield


@pytest.fixture
def interpreted(monkeypatch):
  """The Mosaic kernel on a CPU; gives the shapes of what it multiplies."""
  kernel = pallas_kernels.nf4_product
  seen = []

  def product(x, codes, scales, **options):
    seen.append((x.shape, codes.shape, options['transposed']))
    return kernel(x, codes, scales, **options, implementation='mosaic', interpret=True)

  monkeypatch.setattr(pallas_kernels, 'nf4_product', product)
  return seen


def is_box(x):
  return isinstance(x, Quantized)


def decoded(tree):
  """The same backbone with plain kernels."""
  return jax.tree.map(lambda x: x.unbox() if is_box(x) else x, tree, is_leaf=is_box)


def llama(form=None, **options):
  """(model, its variables in 4 bits)."""
  model = models.from_config(TINY, **options)
  variables = jax.jit(model.init)(jax.random.key(0), TOKENS)
  return model, jpeft.quantize(model, form or jpeft.nf4(), variables, TOKENS)


def same(found, expected, limit=2e-5):
  found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
  for a, b in zip(found, expected, strict=True):
    assert np.abs(np.asarray(a) - np.asarray(b)).max() <= limit * max(1, np.abs(b).max())


def step_of(model, backbone, method, *args):
  """(theta, backbone) -> ((loss, output), gradient), and a theta with noise."""
  tuned = jpeft.attach(model, method, backbone, *args)

  def loss(theta, backbone):
    out = tuned.apply(theta, backbone, *args)
    return jnp.sum(jnp.sin(out)), out

  theta = noisy(jax.jit(tuned.init)(jax.random.key(1), backbone))
  return jax.value_and_grad(loss, has_aux=True), theta


@pytest.mark.parametrize(
  'options',
  fast_if(
    lambda options: options == {'scan': True, 'remat': True},
    ({}, {'scan': True}, {'scan': True, 'remat': True}, {'remat': 'dots'}),
  ),
  ids=str,
)
def test_a_step_by_kernels_is_that_of_the_decoded_model(interpreted, options):
  """LoRA acts on two products of a block; the others are multiplied by their boxes alone."""
  model, small = llama(jpeft.nf4(double=True), **options)
  method = jpeft.lora(2, targets='{q}|{fc2}')
  step, theta = step_of(model, small, method, TOKENS)
  found = jax.jit(step)(theta, small)
  directions = [transposed for *_, transposed in interpreted]
  # Nothing before the only block is trained: what {q}, {k} and {v} read needs no cotangent.
  assert directions.count(False) >= 7 and directions.count(True) >= 4
  plain = decoded(small)
  expected = jax.jit(step_of(model, plain, method, TOKENS)[0])(theta, plain)
  same(found, expected)


def test_layers_of_nnx_and_products_of_several_axes(interpreted):
  class Net(nnx.Module):
    def __init__(self, rngs):
      self.heads = nnx.LinearGeneral(256, (4, 64), rngs=rngs)
      self.mixed = nnx.Einsum('bnhd,hdo->bno', (4, 64, 256), (256,), rngs=rngs)
      self.out = nnx.Linear(256, 128, rngs=rngs)

    def __call__(self, x):
      return self.out(jnp.tanh(self.mixed(self.heads(x))))

  model, x = Net(nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (2, 3, 256))
  backbone = nnx.state(model)
  small = jpeft.quantize(model, jpeft.nf4(), backbone, x, targets='.*')
  method = jpeft.lora(2, targets='out')
  step, theta = step_of(model, small, method, x)
  found = step(theta, small)
  assert {codes for _, codes, transposed in interpreted if not transposed} == {
    (128, 256),
    (128, 128),
  }
  assert len([one for one in interpreted if not one[2]]) == 3
  plain = decoded(small)
  same(found, step_of(model, plain, method, x)[0](theta, plain))


def test_the_input_gets_its_gradient_without_a_rule_at_the_layer(interpreted):
  model, x = nn.Dense(128), jax.random.normal(jax.random.key(0), (3, 256))
  variables = jax.jit(model.init)(jax.random.key(1), x)
  small = jpeft.quantize(model, jpeft.int4(), variables, x, targets='')
  tuned = jpeft.attach(model, jpeft.tune('', arrays='bias'), small, x)
  theta = tuned.init(jax.random.key(2), small)

  def loss(apply):
    return jax.grad(lambda x: jnp.sum(jnp.sin(apply(x))))

  found = loss(lambda x: tuned.apply(theta, small, x))(x)
  assert [transposed for *_, transposed in interpreted] == [False, True]
  same(found, loss(lambda x: model.apply(decoded(small), x))(x))


def test_mapped_inputs_are_more_rows_and_mapped_kernels_are_decoded(interpreted):
  codes, scales = jax.jit(jax.vmap(pallas_kernels.quantize_nf4))(
    jax.random.normal(jax.random.key(0), (2, 256, 128))
  )
  x = jax.random.normal(jax.random.key(1), (5, 3, 256))
  plain = pallas_kernels.reference
  rows = jax.vmap(pallas_kernels.nf4_matmul, (1, None, None), 1)
  same(rows(x, codes[0], scales[0]), plain(x, codes[0], scales[0]))
  text = str(jax.make_jaxpr(rows)(x, codes[0], scales[0]))
  assert pallas_kernels.OPERATION in text
  each = jax.vmap(pallas_kernels.nf4_matmul, (None, 0, 0))
  same(each(x, codes, scales), jnp.stack([plain(x, codes[i], scales[i]) for i in range(2)]))
  assert pallas_kernels.OPERATION not in str(jax.make_jaxpr(each)(x, codes, scales))


@pytest.mark.parametrize(
  ('shape', 'axis', 'is_split'),
  [((4, 6), 'data', True), ((3, 6), 'data', False), ((1, 6), 'sequence', True)],
  ids=('split', 'whole', 'tokens'),
)
def test_on_a_mesh_every_device_multiplies_by_its_own_columns(shape, axis, is_split):
  """Rows over `data`, where it divides them; the sums of the backward pass over `model`."""
  codes, scales = jax.jit(pallas_kernels.quantize_nf4)(
    jax.random.normal(jax.random.key(0), (256, 256))
  )
  x = jax.random.normal(jax.random.key(1), (*shape, 256))

  def step(x, codes, scales):
    product = functools.partial(pallas_kernels.nf4_matmul, implementation='mosaic', interpret=True)
    return jax.value_and_grad(lambda x: jnp.sum(jnp.sin(product(x, codes, scales))))(x)

  mesh = jax.make_mesh((2, 2), (axis, 'model'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  of_x = P(*(axis if size % 2 == 0 else None for size in shape[: 1 if axis == 'data' else 2]))
  placed = (
    jax.device_put(x, NamedSharding(mesh, of_x)),
    jax.device_put(codes, NamedSharding(mesh, P(None, 'model'))),
    jax.device_put(scales, NamedSharding(mesh, P(None, 'model'))),
  )
  lowered = jax.jit(step).lower(*placed)
  split = (
    f'{{"{axis}"}}' in lowered.as_text().split('manual_computation')[1].split('manual_axes')[0]
  )
  assert split == is_split
  program = lowered.compile()
  same(program(*placed), jax.jit(step)(x, codes, scales))
  assert 'all-gather' not in program.as_text()


@pytest.mark.slow
@pytest.mark.parametrize('scan', (False, True))
def test_a_sharded_backbone_is_not_gathered(interpreted, scan):
  model, small = llama(scan=scan)
  step, theta = step_of(model, small, jpeft.lora(2, targets='{linear}'), TOKENS)
  expected = jax.jit(step)(theta, small)
  mesh = jax.make_mesh((2, 2), ('data', 'model'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  tuned = jpeft.attach(model, jpeft.lora(2, targets='{linear}'), small, TOKENS)
  layout = jpeft.training.Layout(tuned, mesh, 'sharded', whole_below=0)
  placed = jax.device_put(small, layout.of_backbone(small))
  program = jax.jit(step).lower(jax.device_put(theta, NamedSharding(mesh, P())), placed).compile()
  # Sums of parts round otherwise: the decoded model, cut alike, is 4e-5 from that on one device.
  same(program(jax.device_put(theta, NamedSharding(mesh, P())), placed), expected, 1e-4)
  gathered = [line for line in program.as_text().splitlines() if ' all-gather(' in line]
  assert gathered and not any('u8[' in line for line in gathered)


def test_the_product_is_linear_in_its_input():
  """Forwards, and twice backwards, through a box that no rule acts on."""
  codes, scales = jax.jit(pallas_kernels.quantize_nf4)(
    jax.random.normal(jax.random.key(0), (256, 128))
  )
  x, t = jax.random.normal(jax.random.key(1), (2, 3, 256))
  product = functools.partial(pallas_kernels.nf4_product, codes=codes, absmax=scales)
  w = jpeft.nf4().decode({'codes': codes, 'absmax': scales}, (256, 128))
  same(jax.jvp(product, (x,), (t,)), (x @ w, t @ w))
  curved = lambda product: jax.grad(
    lambda x: jnp.sum(jnp.sin(jax.grad(lambda x: jnp.sum(product(x) ** 3))(x)))
  )
  same(curved(product)(x), curved(lambda x: x @ w)(x), 1e-4)
  with pytest.raises(NotImplementedError, match='scales .* have no derivative'):
    jax.grad(lambda s: pallas_kernels.nf4_product(x, codes, s).sum())(scales)


@pytest.mark.parametrize('saved', (False, True))
def test_costs_and_gradients_are_those_of_xla(saved):
  """In bfloat16, whole and with what is kept in 4 bits."""
  model = models.from_config(TINY, dtype='bfloat16')
  variables = jax.jit(model.init)(jax.random.key(0), TOKENS)
  method = jpeft.lora(2, targets='{q}')
  if saved:
    method = jpeft.chain(method, jpeft.packed())
  found = {}
  for implementation in ('auto', 'xla'):
    small = jpeft.quantize(model, jpeft.nf4(), variables, TOKENS, implementation=implementation)
    step, theta = step_of(model, small, method, TOKENS)
    traced = jax.jit(step).trace(theta, small)
    assert (pallas_kernels.OPERATION in str(traced.jaxpr)) == (implementation == 'auto')
    ((_, out), gradient) = step(theta, small)
    found[implementation] = programs.flops(traced), out, gradient
  (flops, *arrays), (same_flops, *same_arrays) = found.values()
  assert flops == same_flops
  for a, b in zip(jax.tree.leaves(arrays), jax.tree.leaves(same_arrays), strict=True):
    assert jnp.linalg.norm(a - b) < 2e-2 * jnp.linalg.norm(b)


def test_why_a_kernel_is_decoded():
  model, small = llama()
  (box, *_) = [x for x in jax.tree.leaves(small, is_leaf=is_box) if is_box(x)]
  assert box.refusal(jnp.float32) is None
  with jax.default_matmul_precision(None):
    assert 'those of kernels are exact' in box.refusal(jnp.float32)
    assert box.refusal(jnp.bfloat16) is None
  affine = llama(jpeft.affine())[1]
  (box, *_) = [x for x in jax.tree.leaves(affine, is_leaf=is_box) if is_box(x)]
  assert 'affine has no table of 16 values' in box.refusal(jnp.bfloat16)


@pytest.mark.parametrize('scan', (False, True))
def test_what_multiplies_is_told(scan):
  """By kernels where the shapes let them, by XLA where they do not, each with its reason."""
  model = models.from_config(TINY | {'intermediate_size': 192}, scan=scan, dtype='bfloat16')
  held = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
  small = jax.eval_shape(lambda held: jpeft.quantize(model, jpeft.nf4(), held, TOKENS), held)
  tuned = jpeft.attach(model, jpeft.lora(2, targets='{q}'), small, TOKENS)
  with noting() as products:
    jax.eval_shape(lambda theta, held: tuned.apply(theta, held, TOKENS), tuned.shapes, small)
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ('data', 'model'))
  line = jpeft.quant.told(tuned.sites, products, mesh)
  assert line.startswith('0 of 7 4-bit kernels are multiplied by Pallas; 6 by XLA')
  assert 'there is no kernel for cpu' in line
  chip = types.SimpleNamespace(platform='tpu')
  chips = types.SimpleNamespace(
    devices=np.array([[chip]]), axis_names=('data', 'model'), shape={'data': 1, 'model': 1}
  )
  line = jpeft.quant.told(tuned.sites, products, chips)
  assert line.startswith('4 of 7 4-bit kernels are multiplied by Pallas; 2 by XLA, such as')
  assert 'do not both divide [256, 192]' in line
  assert '1 by XLA' in line and 'a block of 64 crosses the middle of 192 rows' in line


def test_xla_is_asked_for_by_name(interpreted):
  model = models.from_config(TINY)
  variables = jax.jit(model.init)(jax.random.key(0), TOKENS)
  quantize = functools.partial(jpeft.quantize, model, jpeft.nf4(), variables, TOKENS)
  small = quantize(implementation='xla')
  step, theta = step_of(model, small, jpeft.lora(2, targets='{q}'), TOKENS)
  jax.eval_shape(step, theta, small)
  assert not interpreted
  with pytest.raises(ValueError, match="implementation='triton' must be 'auto' or 'xla'"):
    quantize(implementation='triton')


@pytest.mark.aot
@pytest.mark.parametrize('implementation', ('auto', 'xla'))
@pytest.mark.parametrize('scan', (False, True))
def test_a_compiled_step_has_the_kernels(scan, implementation):
  """Also on 2 x 2 chips, where no codes are gathered."""
  model = models.from_config(TINY, scan=scan, dtype='bfloat16', param_dtype='bfloat16')
  tokens = jax.ShapeDtypeStruct((4, 128), jnp.int32)
  held = jax.eval_shape(model.init, jax.random.key(0), tokens)
  small = jax.eval_shape(
    lambda held: jpeft.quantize(model, jpeft.nf4(), held, tokens, implementation=implementation),
    held,
  )
  tuned = jpeft.attach(model, jpeft.lora(2, targets='{q}|{v}'), small, tokens)
  step = jax.grad(lambda theta, held, x: tuned.apply(theta, held, x).astype(jnp.float32).sum())
  for shape in ((1, 1), (2, 2)):
    mesh = target('tpu:v5e:2x2').mesh(*shape)
    layout = jpeft.training.Layout(tuned, mesh, 'sharded', whole_below=0)
    args = (
      jpeft.training.with_sharding(tuned.shapes, NamedSharding(mesh, P())),
      jpeft.training.with_sharding(small, layout.of_backbone(small)),
      jax.ShapeDtypeStruct(tokens.shape, tokens.dtype, sharding=NamedSharding(mesh, P('data'))),
    )
    text = jax.jit(step).lower(*args).compile().as_text()
    assert ('tpu_custom_call' in text) == (implementation == 'auto')
    assert not [x for x in text.splitlines() if 'u8[' in x.split('(')[0] and 'all-gather' in x]
