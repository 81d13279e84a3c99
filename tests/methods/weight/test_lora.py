"""LoRA, rsLoRA, PiSSA, OLoRA and DoRA: worked numbers, Hugging Face peft's numbers, the papers'
counts.
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
from jpeft.methods.weight.lora import dora, lora
from jpeft.training.optim import factors
from tests.methods.golden import full_size, peft

W, BIAS = np.array([[1, 2, 3], [4, 5, 6.0]]), np.array([0.5, -0.5])
A, B = np.array([[1, 0, 1], [0, 2, 0.0]]), np.array([[1, 1], [0, 2.0]])
X = np.array([[1, 2, 3.0]])


def dense(w=W, bias=BIAS):
  """A Dense layer with torch's weight [out, in], and its variables."""
  params = {'kernel': jnp.asarray(w.T, jnp.float32), 'bias': jnp.asarray(bias, jnp.float32)}
  return nn.Dense(len(w)), {'params': params}


def at_root(name, **arrays):
  """theta of one method at a model that is a single layer."""
  return {name: {'': {'kernel': {key: jnp.asarray(x, jnp.float32) for key, x in arrays.items()}}}}


def random_layer(fan_in=12, fan_out=9, seed=0):
  rng = np.random.default_rng(seed)
  model, variables = dense(rng.normal(size=(fan_out, fan_in)), rng.normal(size=fan_out))
  return model, variables, jnp.asarray(rng.normal(size=(4, fan_in)), jnp.float32)


def moved(theta, size=0.3):
  leaves, tree = jax.tree.flatten(theta)
  keys = jax.random.split(jax.random.key(7), len(leaves))
  return tree.unflatten(
    [x + size * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
  )


@pytest.mark.parametrize(
  'rslora, expected', [(False, [30.5, 47.5]), (True, [37.1274185, 54.1274185])]
)
def test_worked_example_of_lora(rslora, expected):
  model, variables = dense()
  tuned = attach(model, lora(2, 4, '', rslora=rslora), variables, X)
  theta = at_root('lora', a=A.T, b=B.T)
  np.testing.assert_allclose(tuned.apply(theta, variables, X)[0], expected, rtol=1e-6)
  kernel = tuned.merge(theta, variables)['params']['kernel']
  scale = 4 / np.sqrt(2) if rslora else 2
  np.testing.assert_allclose(kernel.T - W, scale * np.array([[1, 2, 1], [0, 4, 0]]), rtol=1e-5)


def test_worked_example_of_dora():
  model, variables = dense()
  tuned = attach(model, dora(2, 4, ''), variables, X)
  np.testing.assert_allclose(
    tuned.init(jax.random.key(0), variables)['dora']['']['kernel']['m'],
    [3.7416575, 8.7749643],
    rtol=1e-6,
  )
  theta = at_root('dora', a=A.T, b=B.T, m=[3.7416575, 8.7749643])
  np.testing.assert_allclose(
    tuned.apply(theta, variables, X)[0], [13.9164085, 27.8328629], rtol=1e-6
  )
  grads = jax.grad(lambda t: tuned.apply(t, variables, X).sum())(theta)['dora']['']['kernel']
  np.testing.assert_allclose(grads['m'], [3.5856860, 3.2288294], rtol=1e-5)
  np.testing.assert_allclose(
    grads['b'].T, [[3.5777090, 3.5777090], [4.7221437, 4.7221437]], rtol=1e-5
  )
  np.testing.assert_allclose(
    grads['a'].T, [[0.8944272, 1.7888545, 2.6832817], [3.2554991, 6.5109982, 9.7664976]], rtol=1e-5
  )


LAYERS = {
  'linear_lora': lora(2, 3, ''),
  'linear_rslora': lora(2, 3, '', rslora=True),
  'linear_gaussian': lora(2, 3, '', init='gaussian'),
  'linear_pissa': lora(2, 3, '', init='pissa'),
  'linear_olora': lora(2, 3, '', init='olora'),
  'linear_dora': dora(2, 3, ''),
  'conv_lora': lora(2, 3, ''),
  'conv_dora': dora(2, 3, ''),
  'table_lora': lora(2, 3, ''),
}


def layer_theta(case, method, group='adapter'):
  """theta of a golden layer; where the start is part of the function, with it."""
  held, array = peft.read('peft_layers', case), 'embedding' if case == 'table_lora' else 'kernel'
  t = peft.kernels(held[group], array=array)['']
  if case.endswith(('pissa', 'olora')):
    start = peft.kernels(held['start'])['']['kernel']
    t['kernel'] |= {'a0': start['a'], 'b0': start['b']}
  return {method.names[0]: {'': jax.tree.map(jnp.asarray, t)}}


@pytest.mark.parametrize('case', LAYERS)
def test_layers_equal_peft(case):
  method, (model, variables, x, y) = LAYERS[case], peft.layer(case)
  tuned, theta = attach(model, method, variables, x), layer_theta(case, LAYERS[case])
  assert np.abs(model.apply(variables, x) - y).max() > 0.1
  np.testing.assert_allclose(tuned.apply(theta, variables, x), y, atol=1e-5)
  np.testing.assert_allclose(model.apply(tuned.merge(theta, variables), x), y, atol=1e-5)

  torch_order = (
    (lambda out: jnp.moveaxis(out, -1, 1)) if case.startswith('conv') else lambda out: out
  )
  weights = jnp.sin(jnp.arange(y.size))
  grads = jax.grad(lambda t: torch_order(tuned.apply(t, variables, x)).ravel() @ weights)(theta)
  for key, expected in layer_theta(case, method, 'grad')[method.names[0]][''].items():
    found = grads[method.names[0]][''][key]
    for entry in set(expected) - {'a0', 'b0'}:
      np.testing.assert_allclose(found[entry], expected[entry], atol=2e-5, err_msg=entry)


@pytest.mark.parametrize('case', ['linear_pissa', 'linear_olora'])
def test_decompositions_start_as_in_peft(case):
  model, variables, x, _ = peft.layer(case)
  t = attach(model, LAYERS[case], variables, x).init(jax.random.key(0), variables)['lora'][''][
    'kernel'
  ]
  start = peft.kernels(peft.read('peft_layers', case)['start'])['']['kernel']
  np.testing.assert_allclose(t['a'] @ t['b'], start['a'] @ start['b'], atol=1e-5)
  np.testing.assert_allclose(
    np.abs(t['a']), np.abs(start['a']), atol=1e-5
  )  # singular vectors up to sign


LINEAR = '{linear}'
MODELS = {
  'bert_lora': chain(lora(4, 8, '{q}'), lora(2, 6, '{v}')),  # rank_pattern and alpha_pattern
  'bert_rslora': lora(3, 5, LINEAR, rslora=True),
  'bert_pissa': lora(2, 5, '{q}|{fc1}', init='pissa'),
  'bert_dora': dora(2, 4, '{q}|{v}|{fc1}'),
  'bert_word': lora(2, 4, 'embed/word'),
  'llama_lora': lora(2, 4, LINEAR),
  'llama_dora': dora(2, 4, '{q}|{v}|{fc2}'),
}


@pytest.fixture(scope='session')
def backbones(tmp_path_factory):
  return {'bert': peft.bert(tmp_path_factory.mktemp('bert')), 'llama': peft.llama()}


def model_theta(case, method):
  held = peft.read('peft_models', case)
  rows = peft.BERT if case.startswith('bert') else peft.LLAMA
  read = functools.partial(
    peft.kernels, rows=rows, array='embedding' if case == 'bert_word' else 'kernel'
  )
  theta = read(held['adapter'])
  for path, t in (read(held['start']) if 'start' in held else {}).items():
    theta[path]['kernel'] |= {'a0': t['kernel']['a'], 'b0': t['kernel']['b']}
  return {method.names[0]: theta}


@pytest.mark.parametrize('case', MODELS)
def test_models_equal_peft(case, backbones):
  model, backbone, args = backbones[case.split('_')[0]]
  held, base = (peft.read('peft_models', name) for name in (case, case.split('_')[0]))
  tuned, theta = attach(model, MODELS[case], backbone, *args), model_theta(case, MODELS[case])
  assert jax.tree.map(jnp.shape, theta) == jax.tree.map(jnp.shape, tuned.shapes)
  assert np.abs(held['logits'] - base['logits']).max() > 0.1
  np.testing.assert_allclose(tuned.apply(theta, backbone, *args), held['logits'], atol=5e-6)
  merged = tuned.merge(theta, backbone)
  run = (
    nnx.merge(nnx.graphdef(model), merged)
    if isinstance(model, nnx.Module)
    else functools.partial(model.apply, merged)
  )
  np.testing.assert_allclose(run(*args), held['merged'], atol=5e-6)


METHODS = {
  'lora': lora(4, 6, ''),
  'gaussian': lora(4, 6, '', init='gaussian'),
  'pissa': lora(4, 6, '', init='pissa'),
  'olora': lora(4, 6, '', init='olora'),
  'dora': dora(4, 6, ''),
}


@pytest.mark.parametrize('name', METHODS)
def test_the_function_starts_unchanged_and_merges(name):
  model, variables, x = random_layer()
  tuned = attach(model, METHODS[name], variables, x)
  theta, y = jax.jit(tuned.init)(jax.random.key(0), variables), model.apply(variables, x)
  found = tuned.apply(theta, variables, x)
  np.testing.assert_allclose(found, y, atol=2e-6)
  if name in ('lora', 'gaussian'):
    np.testing.assert_array_equal(found, y)
  np.testing.assert_allclose(
    tuned.merge(theta, variables)['params']['kernel'], variables['params']['kernel'], atol=1e-6
  )
  theta = moved(theta)
  found = tuned.apply(theta, variables, x)
  assert np.abs(found - y).max() > 0.1
  np.testing.assert_allclose(model.apply(tuned.merge(theta, variables), x), found, atol=1e-5)


def test_pissa_takes_the_top_of_the_spectrum():
  model, variables, x = random_layer()
  w = np.asarray(variables['params']['kernel'])
  tuned = attach(model, lora(4, 8, '', init='pissa'), variables, x)
  theta = jax.jit(tuned.init)(jax.random.key(0), variables)
  t, spectrum = theta['lora']['']['kernel'], np.linalg.svd(w, compute_uv=False)
  np.testing.assert_allclose((t['a'] ** 2).sum(0), spectrum[:4] / 2, rtol=1e-5)  # s = 8 / 4
  np.testing.assert_allclose((t['b'] ** 2).sum(1), spectrum[:4] / 2, rtol=1e-5)
  rest = np.linalg.svd(w - 2 * t['a'] @ t['b'], compute_uv=False)
  np.testing.assert_allclose(rest[:5], spectrum[4:], rtol=1e-4)
  np.testing.assert_allclose(rest[5:], 0, atol=1e-5)
  entries = tuned.trainable(theta)['lora']['']['kernel']
  assert entries == {'a': True, 'b': True, 'a0': False, 'b0': False}


def test_olora_starts_orthogonal():
  model, variables, x = random_layer()
  tuned = attach(model, lora(4, 8, '', init='olora'), variables, x)
  t = jax.jit(tuned.init)(jax.random.key(0), variables)['lora']['']['kernel']
  np.testing.assert_allclose(t['b'] @ t['b'].T, np.eye(4), atol=1e-5)
  w = np.asarray(variables['params']['kernel'])
  np.testing.assert_allclose(t['b'] @ w.T, t['a'].T, atol=1e-5)  # what b spans of w is a b


def test_how_a_starts():
  model, variables, x = random_layer(fan_in=400, fan_out=3)
  start = lambda **kw: attach(model, lora(50, 8, '', **kw), variables, x).init(
    jax.random.key(0), variables
  )['lora']['']['kernel']
  a = start()['a']
  assert 0.0499 < np.abs(a).max() <= 0.05
  np.testing.assert_allclose(a.std(), (3 * 400) ** -0.5, rtol=0.02)
  np.testing.assert_allclose(start(init='gaussian')['a'].std(), 1 / 50, rtol=0.02)


class Tied(nn.Module):
  """A language model whose table embeds the tokens and makes the logits."""

  @nn.compact
  def __call__(self, tokens):
    table = nn.Embed(7, 6, name='table')
    return table.attend(jnp.tanh(table(tokens)))


def test_a_tied_table_is_adapted_in_both_places():
  model, tokens = Tied(), jnp.array([[0, 3, 6]])
  variables = jax.jit(model.init)(jax.random.key(0), tokens)
  tuned = attach(model, lora(2, 4, 'table'), variables, tokens)
  theta = jax.jit(tuned.init)(jax.random.key(1), variables)
  t = theta['lora']['table']['embedding']
  assert t['a'].shape == (7, 2) and not t['a'].any()
  assert t['b'].shape == (2, 6) and t['b'].std() > 0.5
  np.testing.assert_array_equal(
    tuned.apply(theta, variables, tokens), model.apply(variables, tokens)
  )
  theta = moved(theta)
  table = np.asarray(variables['params']['table']['embedding'])
  t = theta['lora']['table']['embedding']
  table = table + 2 * np.asarray(t['a'] @ t['b'])
  expected = np.tanh(table[[0, 3, 6]]) @ table.T
  np.testing.assert_allclose(tuned.apply(theta, variables, tokens)[0], expected, atol=1e-5)
  np.testing.assert_allclose(
    model.apply(tuned.merge(theta, variables), tokens)[0], expected, atol=1e-5
  )


def test_dora_of_a_tied_table_has_a_magnitude_for_every_feature():
  """As peft: v = table + s a b, m and |v| over the rows of a feature, |v| no part of a gradient."""
  model, tokens = Tied(), jnp.array([[0, 3, 6]])
  variables = jax.jit(model.init)(jax.random.key(0), tokens)
  tuned = attach(model, dora(2, 4, 'table'), variables, tokens)
  theta = jax.jit(tuned.init)(jax.random.key(1), variables)
  t = theta['dora']['table']['embedding']
  assert {name: x.shape for name, x in t.items()} == {'a': (7, 2), 'b': (2, 6), 'm': (6,)}
  assert not t['a'].any() and t['b'].std() > 0.5
  plain = model.apply(variables, tokens)
  np.testing.assert_allclose(tuned.apply(theta, variables, tokens), plain, atol=1e-6)

  theta = moved(theta)
  table = variables['params']['table']['embedding']

  def expected(t):
    v = table + 2 * t['a'] @ t['b']
    new = t['m'] / jax.lax.stop_gradient(jnp.linalg.norm(v, axis=0)) * v
    return jnp.tanh(new[tokens]) @ new.T

  t = theta['dora']['table']['embedding']
  np.testing.assert_allclose(tuned.apply(theta, variables, tokens), expected(t), atol=1e-5)
  merged = tuned.merge(theta, variables)
  np.testing.assert_allclose(model.apply(merged, tokens), expected(t), atol=1e-5)
  loss = lambda theta: jnp.sin(tuned.apply(theta, variables, tokens)).sum()
  found = jax.grad(loss)(theta)['dora']['table']['embedding']
  wanted = jax.grad(lambda t: jnp.sin(expected(t)).sum())(t)
  for name, grad in wanted.items():
    assert jnp.abs(grad).max() > 1e-3
    np.testing.assert_allclose(found[name], grad, atol=1e-5, err_msg=name)


def test_dora_adapts_tables_and_kernels_of_one_pattern(backbones):
  model, variables, args = backbones['bert']
  tuned = attach(model, dora(2, 4, 'embed/word|{q}'), variables, *args)
  assert set(tuned.shapes['dora']['embed/word']['embedding']) == {'a', 'b', 'm'}
  assert len(tuned.shapes['dora']) == 3
  theta = moved(jax.jit(tuned.init)(jax.random.key(0), variables))
  out = tuned.apply(theta, variables, *args)
  assert np.abs(out - model.apply(variables, *args)).max() > 1e-2
  merged = tuned.merge(theta, variables)
  np.testing.assert_allclose(model.apply(merged, *args), out, atol=1e-5)


def runs(method, keys=300):
  """(outputs under dropout [keys, ...], output in evaluation, base output) of a layer with a moved
  theta.
  """
  model, variables, x = random_layer()
  tuned = attach(model, method, variables, x)
  theta = moved(tuned.init(jax.random.key(0), variables))
  train = jax.vmap(lambda key: tuned.apply(theta, variables, x, rngs={'dropout': key}))
  return (
    train(jax.random.split(jax.random.key(1), keys)),
    tuned.apply(theta, variables, x),
    model.apply(variables, x),
  )


@pytest.mark.parametrize('make', [lora, dora])
def test_dropout_thins_the_adapters_input_alone(make):
  train, evaluation, base = runs(make(4, 6, '', dropout=0.5))
  assert train.std(0).min() > 0.01
  np.testing.assert_allclose(
    train.mean(0), evaluation, atol=6 * float(train.std(0).max()) / 300**0.5
  )
  everything, _, _ = runs(make(4, 6, '', dropout=1.0), keys=2)
  np.testing.assert_array_equal(everything[0], everything[1])
  np.testing.assert_allclose(everything[0], base, rtol=1e-6)
  np.testing.assert_array_equal(runs(make(4, 6, ''), keys=2)[0].std(0), 0)


def test_gradients_are_finite_when_all_is_dropped():
  model, variables, x = random_layer()
  tuned = attach(model, lora(4, 6, '', dropout=1.0), variables, x)
  theta = moved(tuned.init(jax.random.key(0), variables))
  loss = lambda t: tuned.apply(t, variables, x, rngs={'dropout': jax.random.key(0)}).sum()
  for grad in jax.tree.leaves(jax.grad(loss)(theta)):
    np.testing.assert_array_equal(grad, 0)


def test_dropout_needs_an_injection_point():
  model, tokens = Tied(), jnp.array([[0, 3, 6]])
  with pytest.raises(ValueError, match="lora at 'table'.*use dropout=0"):
    attach(
      model,
      lora(2, 4, 'table', dropout=0.1),
      jax.jit(model.init)(jax.random.key(0), tokens),
      tokens,
    )


class Switched(nn.Module):
  """A layer in a model that says itself whether it trains."""

  @nn.compact
  def __call__(self, x, deterministic=True):
    return nn.Dense(9, name='layer')(x)


def test_dropout_in_training_needs_a_key():
  model, x = Switched(), jnp.ones((2, 12))
  variables = jax.jit(model.init)(jax.random.key(0), x)
  tuned = attach(model, lora(4, 6, 'layer', dropout=0.5), variables, x)
  theta = jax.jit(tuned.init)(jax.random.key(1), variables)
  tuned.apply(theta, variables, x, deterministic=True)
  with pytest.raises(ValueError, match="lora dropout at 'layer' needs a random key"):
    tuned.apply(theta, variables, x, deterministic=False)


def test_dora_keeps_columns_of_zeros():
  model, variables, x = random_layer()
  variables['params']['kernel'] = variables['params']['kernel'].at[:, 2].set(0)
  tuned = attach(model, dora(4, 6, ''), variables, x)
  theta = jax.jit(tuned.init)(jax.random.key(0), variables)
  value, grads = jax.value_and_grad(lambda t: (tuned.apply(t, variables, x) ** 2).sum())(theta)
  assert all(jnp.isfinite(g).all() for g in jax.tree.leaves((value, grads)))
  np.testing.assert_allclose(tuned.apply(theta, variables, x), model.apply(variables, x), atol=2e-6)


@pytest.mark.parametrize('method', [lora(4, 6, ''), lora(4, 6, '', init='pissa'), dora(4, 6, '')])
def test_nothing_of_the_size_of_the_kernel_is_formed(method):
  model, variables, x = random_layer(12, 9)

  def products(method):
    tuned = attach(model, method, variables, x)
    theta = jax.jit(tuned.init)(jax.random.key(0), variables)
    text = str(jax.make_jaxpr(jax.grad(lambda t: (tuned.apply(t, variables, x) ** 2).sum()))(theta))
    return re.findall(r'f32\[(?:12,9|9,12)\] = dot_general', text)

  assert not products(method)
  ((pattern, rule),) = method
  assert products(Method(((pattern, dataclasses.replace(rule, dot=None)),)))  # boxed


LLAMA_7B = full_size.llama(layers=32, width=4096, hidden=11008)


@pytest.mark.parametrize(
  'method, expected',
  [
    (lora(8), 4_194_304),
    (lora(64, targets='{linear}'), 159_907_840),
    (dora(32, targets='{q}|{k}|{v}|.*/up_proj|{fc2}'), 56_975_360),
    (lora(32, targets='{q}|{k}|{v}|.*/up_proj|{fc2}'), 56_098_816),
  ],
)
def test_counts_on_llama_7b(method, expected):
  assert jpeft.summary(attach(LLAMA_7B.model, method, *LLAMA_7B.shapes)).trainable == expected


def test_counts_on_roberta_base():
  roberta = full_size.roberta_base()
  tuned = attach(roberta.model, lora(8), *roberta.shapes)
  assert jpeft.summary(tuned).trainable == 294_912
  # What the start of PiSSA is kept for is not trained.
  assert (
    jpeft.summary(attach(roberta.model, lora(8, init='pissa'), *roberta.shapes)).trainable
    == 294_912
  )


def test_lora_plus_speeds_up_b_alone():
  model, variables, x = random_layer()
  tuned = attach(model, dora(4, 6, ''), variables, x)
  assert factors(tuned, tuned.shapes, lora_plus=16.0) == {
    'dora/kernel/a': 1.0,
    'dora/kernel/b': 16.0,
    'dora/kernel/m': 1.0,
  }


@pytest.mark.parametrize('make', [lora, dora])
@pytest.mark.parametrize(
  'wrong, message',
  [
    ({'rank': 0}, 'rank.*at least 1.*0'),
    ({'rank': 2.5}, 'rank.*whole.*2.5'),
    ({'alpha': 0}, 'alpha.*greater than 0.*0'),
    ({'dropout': 1.5}, r'dropout.*\[0, 1\].*1.5'),
  ],
)
def test_hyperparameters_are_checked(make, wrong, message):
  with pytest.raises(ValueError, match=message):
    make(**wrong)


def test_starts_are_checked():
  with pytest.raises(ValueError, match="not 'pisa'; did you mean 'pissa'"):
    lora(init='pisa')
  model, variables, x = random_layer(12, 9)
  with pytest.raises(
    ValueError, match=r"'olora' takes at most rank 9 out of a matrix \[12, 9\], not 10"
  ):
    attach(model, lora(10, targets='', init='olora'), variables, x)
