"""4-bit backbones: any model, any method, no decoded kernel in the residuals, what is on disk."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import jpeft
from jpeft import models
from jpeft.decoding import generate
from jpeft.quant import Quantized, from_bitsandbytes, to_bitsandbytes
from jpeft.training import checkpoints
from tests.contract.anatomies import described
from tests.fixtures import BACKBONES, noisy
from tests.models.goldens import GOLDEN, golden
from tests.models.test_llama import LLAMA_2_7B, TOKENS
from tests.params import fast_if

FIXTURES = (
  'linen_vit',
  'linen_vit_scan',
  'linen_gemma',
  'linen_fused',
  'nnx_vit',
  'nnx_vit_scan',
  'nnx_llama',
)


def boxes(tree):
  return [
    x
    for x in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Quantized))
    if isinstance(x, Quantized)
  ]


def decoded(tree):
  """The same backbone with plain kernels."""
  plain = lambda x: x.unbox() if isinstance(x, Quantized) else x
  return jax.tree.map(plain, tree, is_leaf=lambda x: isinstance(x, Quantized))


@pytest.mark.parametrize('name', fast_if(lambda name: name == 'nnx_vit_scan', FIXTURES))
def test_a_tuned_model_computes_with_the_decoded_kernels(name):
  b = BACKBONES[name]
  with described(b):
    small = jpeft.quantize(b.model, jpeft.nf4(), b.backbone, *b.args, **b.kwargs)
    tuned, plain = (
      jpeft.attach(b.model, jpeft.lora(2, targets='{linear}'), held, *b.args, **b.kwargs)
      for held in (small, b.backbone)
    )
  assert len(boxes(small)) >= 2 and jpeft.nbytes(small) < jpeft.nbytes(b.backbone)
  assert {k: s.leaves for k, s in tuned.sites.items()} == {
    k: s.leaves for k, s in plain.sites.items()
  }
  theta = noisy(plain.init(jax.random.key(0), b.backbone))

  def value(tuned):
    def loss(theta, backbone):
      out = tuned.apply(theta, backbone, *b.args, **b.kwargs)
      return jnp.sum(jnp.sin(out)), out

    return jax.jit(jax.grad(loss, has_aux=True))

  got, want = value(tuned)(theta, small), value(plain)(theta, decoded(small))
  assert np.abs(np.asarray(want[1])).max() > 0.1
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, atol=1e-6 * float(jnp.abs(b).max()) + 1e-6, rtol=1e-4
    ),
    got,
    want,
  )


def llama(**options):
  loaded = models.load(GOLDEN / 'llama', **options)
  return loaded.model, loaded.variables, jnp.arange(16).reshape(2, 8)


@pytest.mark.parametrize('scan', (False, True))
def test_nothing_decoded_is_kept_for_the_backward_pass(scan):
  model, variables, tokens = llama(scan=scan)
  small = jpeft.quantize(model, jpeft.nf4(), variables, tokens)
  sizes = {math.prod(box.leaf.shape) * (n if scan else 1) for box in boxes(small) for n in (1, 2)}
  method = jpeft.lora(2, targets='{q}|{v}')

  def kept(backbone):
    tuned = jpeft.attach(model, method, backbone, tokens)
    theta = jax.jit(tuned.init)(jax.random.key(0), backbone)
    residuals = jax.eval_shape(
      lambda theta: jax.vjp(lambda t: tuned.apply(t, backbone, tokens), theta)[1], theta
    )
    return [
      x.shape
      for x in jax.tree.leaves(residuals)
      if jnp.issubdtype(x.dtype, jnp.floating)
      and math.prod(x.shape) in sizes
      and x.shape[-2:] in kernels
    ]

  kernels = {box.leaf.shape for box in boxes(small)}
  assert len(kept(variables)) >= 5
  assert kept(small) == []


def test_a_quantized_model_runs_and_merges():
  model, variables, tokens = llama(scan=True)
  small = jpeft.quantize(model, jpeft.fp4(double=True), variables, tokens, targets='{q}|{fc1}')
  assert len(boxes(small)) == 3
  np.testing.assert_allclose(
    model.apply(small, tokens), model.apply(decoded(small), tokens), atol=1e-5
  )
  tuned = jpeft.attach(model, jpeft.lora(2, targets='{q}'), small, tokens)
  theta = noisy(jax.jit(tuned.init)(jax.random.key(0), small))
  merged = tuned.merge(theta, small)
  assert len(boxes(merged)) == 2
  np.testing.assert_allclose(
    model.apply(merged, tokens), tuned.apply(theta, small, tokens), atol=1e-4
  )
  got = generate(tuned, small, tokens, theta=theta, new_tokens=4).tokens
  np.testing.assert_array_equal(got, generate(model, decoded(merged), tokens, new_tokens=4).tokens)


@pytest.mark.parametrize(
  ('form', 'gigabytes'),
  ((jpeft.nf4(), 3.238 + 0.405), (jpeft.nf4(double=True), 3.238 + 0.103)),
  ids=str,
)
def test_llama_2_7b_has_the_published_sizes(form, gigabytes):
  """QLoRA (arXiv:2305.14314): 6.476 G weights in the blocks, and 159,907,840 of LoRA r = 64."""
  model = models.from_config(LLAMA_2_7B, scan=True, param_dtype='bfloat16')
  held = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
  small = jax.eval_shape(lambda held: jpeft.quantize(model, form, held, TOKENS), held)
  norms = 2 * 32 * 4096 * 2
  assert abs((jpeft.nbytes(small['params']['decoder']) - norms) / 1e9 - gigabytes) < 1e-3
  tuned = jpeft.attach(model, jpeft.qlora(), small, TOKENS)
  assert sum(math.prod(x.shape) for x in jax.tree.leaves(tuned.shapes)) == 159_907_840


@pytest.mark.parametrize(
  ('form', 'bits'),
  (
    (jpeft.nf4(), 4.5),
    (jpeft.nf4(double=True), 4.127),
    (jpeft.int4(), 4.5),
    (jpeft.int4(minimum=True), 5),
  ),
  ids=str,
)
def test_bits_a_weight_are_those_on_disk(form, bits, tmp_path):
  module = nn.Dense(512, use_bias=False)
  x = jnp.zeros((1, 1024))
  held = jax.jit(module.init)(jax.random.key(0), x)
  small = jpeft.quantize(module, form, held, x, targets='')
  assert abs(8 * jpeft.nbytes(small) / 2**19 - bits) < 1e-3
  assert jpeft.nbytes(small) == jpeft.nbytes(
    jax.eval_shape(lambda h: jpeft.quantize(module, form, h, x, targets=''), held)
  )
  checkpoints.save_theta(tmp_path / 'small.safetensors', small)
  assert abs(8 * (tmp_path / 'small.safetensors').stat().st_size / 2**19 - bits) < 0.02


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_quantized_backbone_survives_safetensors_and_orbax(tmp_path):
  model, variables, tokens = llama(scan=True)
  small = jpeft.quantize(model, jpeft.nf4(double=True), variables, tokens)
  like = jax.eval_shape(lambda: jpeft.quantize(model, jpeft.nf4(double=True), variables, tokens))
  checkpoints.save_theta(tmp_path / 'small.safetensors', small)
  same(checkpoints.load_theta(tmp_path / 'small.safetensors', like)[0], small)
  with ocp.StandardCheckpointer() as saver:
    saver.save(tmp_path / 'orbax', small)
    saver.wait_until_finished()
    same(saver.restore(tmp_path / 'orbax', like), small)


def test_layers_of_a_stack_go_to_files_of_bitsandbytes():
  model, variables, tokens = llama(scan=True)
  small = jpeft.quantize(model, jpeft.nf4(), variables, tokens, targets='{fc2}')
  (box,) = boxes(small)
  with pytest.raises(ValueError, match='a stack of kernels of shape'):
    to_bitsandbytes(box, 'w')
  one = jax.tree.map(lambda x: x[1], box)
  back = from_bitsandbytes(to_bitsandbytes(one, 'w'), 'w')
  np.testing.assert_array_equal(back.unbox(), box.unbox()[1])


def test_layers_stacked_behind_are_quantized_one_by_one():
  """Layers on axis 1, in a module without the usual names."""

  class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      return x + nn.Dense(32, use_bias=False, name='dense')(x), None

  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      layers = nn.scan(Layer, variable_axes={'params': 1}, split_rngs={'params': True}, length=3)
      return layers(name='layers')(x, None)[0]

  x = jax.random.normal(jax.random.key(1), (2, 32))
  held = Net().init(jax.random.key(0), x)
  small = jpeft.quantize(Net(), jpeft.nf4(), held, x, targets='layers/dense')
  (box,) = boxes(small)
  kernel = held['params']['layers']['dense']['kernel']
  assert box.shape == kernel.shape == (32, 3, 32)
  for i in range(3):
    alone = jpeft.nf4().decode(jpeft.nf4().encode(kernel[:, i]), (32, 32))
    np.testing.assert_array_equal(box.unbox()[:, i], alone)
  np.testing.assert_allclose(Net().apply(small, x), Net().apply(decoded(small), x), atol=1e-6)


@pytest.mark.parametrize(('name', 'scan'), (('llama', True), ('qwen3', False), ('vit', True)))
def test_what_is_quantized_while_it_is_read_is_the_same(name, scan):
  inputs, _ = golden(name)
  whole = models.load(GOLDEN / name, scan=scan, param_dtype='bfloat16')
  small = jpeft.quantize(
    whole.model, jpeft.nf4(), whole.variables, *list(inputs.values())[:1], targets='{fc1}|{q}'
  )
  read = models.load(
    GOLDEN / name, scan=scan, param_dtype='bfloat16', quantize=jpeft.nf4(), targets='{fc1}|{q}'
  )
  assert len(boxes(read.variables)) >= 2
  same(read.variables, small)


def test_no_kernel_at_the_targets():
  model, variables, tokens = llama()
  with pytest.raises(ValueError, match="no kernel lies at 'embed'"):
    jpeft.quantize(model, jpeft.nf4(), variables, tokens, targets='embed')


def test_nnx_models_run_by_themselves():
  b = BACKBONES['nnx_llama']
  small = jpeft.quantize(b.model, jpeft.nf4(), b.backbone, *b.args, **b.kwargs)
  tuned = jpeft.attach(b.model, jpeft.tune('{final_norm}'), small, *b.args, **b.kwargs)
  want = nnx.merge(nnx.graphdef(b.model), decoded(small))(*b.args, **b.kwargs)
  got = tuned.apply(tuned.init(jax.random.key(0), small), small, *b.args, **b.kwargs)
  np.testing.assert_allclose(got, want, atol=1e-5)
