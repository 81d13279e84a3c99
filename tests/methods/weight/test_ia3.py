"""(IA)^3: worked numbers, Hugging Face peft's numbers, the paper's counts, bare and fused
weights.
"""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from jpeft.core import Method, attach, chain
from jpeft.methods.weight.ia3 import ia3
from jpeft.methods.weight.lora import dora, lora
from tests.methods.golden import full_size, peft

PARAMS = {'kernel': jnp.array([[1, 4], [2, 5], [3, 6.0]]), 'bias': jnp.array([0.5, -0.5])}
LAYER, VARIABLES, X = nn.Dense(2), {'params': PARAMS}, jnp.array([[1, 2, 3.0]])
OUT, IN = ia3('', None), ia3(None, '')


@pytest.mark.parametrize(
  'method, l, y, merged, bias',
  [
    (OUT, [2, 3], [29, 94.5], [[2, 4, 6], [12, 15, 18]], [1, -1.5]),
    (IN, [2, 3, 4], [50.5, 109.5], [[2, 6, 12], [8, 15, 24]], [0.5, -0.5]),
  ],
)
def test_worked_examples(method, l, y, merged, bias):
  tuned = attach(LAYER, method, VARIABLES, X)
  theta = {'ia3': {'': {'kernel': jnp.array(l, jnp.float32)}}}
  np.testing.assert_array_equal(tuned.apply(theta, VARIABLES, X)[0], y)
  plain = tuned.merge(theta, VARIABLES)['params']
  np.testing.assert_array_equal(plain['kernel'].T, merged)
  np.testing.assert_array_equal(plain['bias'], bias)


@pytest.mark.parametrize('method', [OUT, IN])
def test_the_function_starts_unchanged_bit_for_bit(method):
  x = jax.random.normal(jax.random.key(0), (5, 3))
  tuned = attach(LAYER, method, VARIABLES, x)
  found = tuned.apply(tuned.init(jax.random.key(1), VARIABLES), VARIABLES, x)
  np.testing.assert_array_equal(found, LAYER.apply(VARIABLES, x))


def test_the_gradient_is_that_of_the_unscaled_output():
  x, g = jax.random.normal(jax.random.key(0), (5, 3)), jax.random.normal(jax.random.key(1), (5, 2))
  tuned = attach(LAYER, OUT, VARIABLES, x)
  theta = jax.jit(tuned.init)(jax.random.key(2), VARIABLES)
  grad = jax.grad(lambda t: (tuned.apply(t, VARIABLES, x) * g).sum())(theta)['ia3']['']['kernel']
  np.testing.assert_allclose(grad, (g * LAYER.apply(VARIABLES, x)).sum(0), rtol=1e-5)


LAYERS = {'linear_ia3_out': OUT, 'linear_ia3_in': IN, 'conv_ia3_out': OUT, 'conv_ia3_in': IN}


@pytest.mark.parametrize('case', LAYERS)
def test_layers_equal_peft(case):
  model, variables, x, y = peft.layer(case)
  held, tuned = peft.read('peft_layers', case), attach(model, LAYERS[case], variables, x)
  theta = {'ia3': peft.vectors(held['adapter'])}
  assert np.abs(model.apply(variables, x) - y).max() > 0.1
  np.testing.assert_allclose(tuned.apply(theta, variables, x), y, atol=1e-6)
  np.testing.assert_allclose(model.apply(tuned.merge(theta, variables), x), y, atol=1e-6)

  torch_order = (
    (lambda out: jnp.moveaxis(out, -1, 1)) if case.startswith('conv') else lambda out: out
  )
  weights = jnp.sin(jnp.arange(y.size))
  grads = jax.grad(lambda t: torch_order(tuned.apply(t, variables, x)).ravel() @ weights)(theta)
  np.testing.assert_allclose(
    grads['ia3']['']['kernel'], peft.vectors(held['grad'])['']['kernel'], atol=1e-5
  )


# peft's own choice for BERT names 'output.dense', which is the attention's as well as the MLP's.
MODELS = {'bert_ia3': ia3(targets_in='{fc2}|{o}'), 'llama_ia3': ia3()}


@pytest.mark.parametrize('case', MODELS)
def test_models_equal_peft(case, tmp_path):
  name = case.split('_')[0]
  model, backbone, args = peft.bert(tmp_path) if name == 'bert' else peft.llama()
  held, base = peft.read('peft_models', case), peft.read('peft_models', name)
  tuned = attach(model, MODELS[case], backbone, *args)
  theta = {'ia3': peft.vectors(held['adapter'], peft.BERT if name == 'bert' else peft.LLAMA)}
  assert jax.tree.map(jnp.shape, theta) == jax.tree.map(jnp.shape, tuned.shapes)
  assert np.abs(held['logits'] - base['logits']).max() > 0.1
  np.testing.assert_allclose(tuned.apply(theta, backbone, *args), held['logits'], atol=5e-6)
  merged = tuned.merge(theta, backbone)
  run = (
    nnx.merge(nnx.graphdef(model), merged)
    if name == 'llama'
    else functools.partial(model.apply, merged)
  )
  np.testing.assert_allclose(run(*args), held['merged'], atol=5e-6)


@pytest.mark.parametrize('method', [OUT, IN])
def test_no_gradient_of_the_kernel_is_formed(method):
  model, x = nn.Dense(9), jnp.ones((4, 12))
  variables = jax.jit(model.init)(jax.random.key(0), x)

  def products(method):
    tuned = attach(model, method, variables, x)
    theta = jax.jit(tuned.init)(jax.random.key(0), variables)
    text = str(jax.make_jaxpr(jax.grad(lambda t: (tuned.apply(t, variables, x) ** 2).sum()))(theta))
    return re.findall(r'f32\[(?:12,9|9,12)\] = dot_general', text)

  assert not products(method)
  ((pattern, rule),) = method
  assert products(Method(((pattern, dataclasses.replace(rule, dot=None)),)))  # boxed


class Heads(nn.Module):
  """Projects to heads and back by DenseGeneral, and by one bare weight for keys and values."""

  @nn.compact
  def __call__(self, x):
    q = nn.DenseGeneral((2, 3), name='query')(x)
    kv = self.param('kv', nn.initializers.normal(1.0), (2, 2, 6, 3))
    k, v = jnp.einsum('BND,CHDK->CBNHK', x, kv)
    return nn.DenseGeneral(6, axis=(-2, -1), name='out')(q * jnp.tanh(k) + v)


def test_heads_and_bare_weights():
  model, x = Heads(), jax.random.normal(jax.random.key(0), (2, 4, 6))
  variables = jax.tree.map(lambda w: w + 0.1, jax.jit(model.init)(jax.random.key(1), x))
  method = chain(ia3('query', 'out'), ia3('', None, arrays='kv'))
  tuned = attach(model, method, variables, x)
  assert jax.tree.map(jnp.shape, tuned.shapes) == {
    'ia3': {'query': {'kernel': (6,)}, 'out': {'kernel': (6,)}, '': {'kv': (12,)}}
  }
  t = {'query': jnp.arange(6.0), 'out': jnp.arange(1, 7.0), '': jnp.linspace(-1, 1, 12)}
  theta = {'ia3': {path: {'kv' if path == '' else 'kernel': l} for path, l in t.items()}}

  p = jax.tree.map(np.asarray, variables['params'])
  q = np.einsum('BND,DHK->BNHK', x, p['query']['kernel']) + p['query']['bias']
  q = q * np.arange(6.0).reshape(2, 3)
  kv = np.einsum('BND,CHDK->CBNHK', x, p['kv']) * np.linspace(-1, 1, 12).reshape(2, 1, 1, 2, 3)
  hidden = (q * np.tanh(kv[0]) + kv[1]) * np.arange(1, 7.0).reshape(2, 3)
  y = np.einsum('BNHK,HKD->BND', hidden, p['out']['kernel']) + p['out']['bias']
  np.testing.assert_allclose(tuned.apply(theta, variables, x), y, atol=2e-5)
  np.testing.assert_allclose(model.apply(tuned.merge(theta, variables), x), y, atol=2e-5)


def test_it_chains_with_rules_that_read_the_kernel():
  x = jax.random.normal(jax.random.key(0), (5, 3))
  tuned = attach(LAYER, chain(lora(2, 4, ''), OUT, dora(2, 4, '')), VARIABLES, x)
  theta = jax.tree.map(lambda a: a + 0.3, jax.jit(tuned.init)(jax.random.key(1), VARIABLES))
  found = tuned.apply(theta, VARIABLES, x)
  assert np.abs(found - LAYER.apply(VARIABLES, x)).max() > 1
  np.testing.assert_allclose(
    LAYER.apply(tuned.merge(theta, VARIABLES), x), found, rtol=1e-5, atol=1e-5
  )


@pytest.mark.parametrize(
  'model, expected',
  [
    (full_size.llama(layers=32, width=4096, hidden=11008), 614_400),
    (full_size.t0(width=2048, hidden=5120, heads=32), 540_672),
    (full_size.t0(width=4096, hidden=10240, heads=64), 1_081_344),
  ],
  ids=['LLaMA-7B', 'T0-3B', 'T0-11B'],
)
def test_full_size_counts(model, expected):
  assert jpeft.summary(attach(model.model, ia3(), *model.shapes)).trainable == expected


def test_something_must_be_targeted():
  with pytest.raises(ValueError, match='targets_out or targets_in, not None for both'):
    ia3(None, None)
