"""Bottleneck adapters: what each reads and where it adds, starts, scales, and the counts of the
papers.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.methods.adapter.bottleneck import adaptformer, houlsby, parallel, pfeiffer
from jpeft.methods.prompt.prefix import prefix
from tests.fixtures import EDGES, noisy
from tests.methods.golden import full_size

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(2, 5, 6)), jnp.float32)


class Mlp(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(6, name='fc2')(jnp.tanh(nn.Dense(8, name='fc1')(x)))


class Block(nn.Module):
  """A block whose attention is one projection; `post`: norms come last; `gain`: of the MLP's
  branch.
  """

  post: bool = False
  gain: float = 0.5

  @nn.compact
  def __call__(self, x):
    out, mlp, norms = (
      nn.Dense(6, name='out'),
      Mlp(name='mlp'),
      [nn.LayerNorm(name=f'norm{i}') for i in (1, 2)],
    )
    if self.post:
      u = norms[0](x + out(x))
      return norms[1](u + mlp(u)), None
    u = x + out(norms[0](x))
    return u + self.gain * mlp(norms[1](u)), None


class Blocks(nn.Module):
  post: bool = False

  @nn.compact
  def __call__(self, x):
    return Block(self.post, name='block_0')(x)[0]


# numpy, from the parameters of a Block.
def linear(p, x):
  return x @ np.asarray(p['kernel']) + np.asarray(p['bias'])


def norm(p, x):
  x = np.asarray(x)
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
  return x * np.asarray(p['scale']) + np.asarray(p['bias'])


def mlp(p, x):
  return linear(p['fc2'], np.tanh(linear(p['fc1'], x)))


def relu(x):
  return np.maximum(x, 0)


def gelu(x):
  return np.asarray(jax.nn.gelu(x))


def adapter(t, x, f=relu):
  return linear(t['up'], f(linear(t['down'], np.asarray(x))))


def setup(method, post=False):
  """(tuned, theta off its start, {site path: of its theta}, variables, the block's parameters)."""
  model = Blocks(post)
  variables = noisy(model.init(jax.random.key(0), X), 0.3)
  tuned = jpeft.attach(model, method, variables, X)
  theta = noisy(tuned.init(jax.random.key(0), variables), 0.5)
  return tuned, theta, next(iter(theta.values())), variables, variables['params']['block_0']


def check(tuned, theta, variables, want):
  plain = tuned.model.apply(variables, X)
  np.testing.assert_allclose(tuned.apply(theta, variables, X), want, atol=2e-5)
  assert np.abs(want - plain).max() > 0.1


OUT, FC2, MLP, END = 'block_0/out', 'block_0/mlp/fc2', 'block_0/mlp', 'block_0/norm2'


def test_adaptformer_reads_the_stream_before_the_norm_and_adds_behind_the_branch():
  tuned, theta, t, variables, p = setup(adaptformer(3, 0.7, stream='block_0/norm2'))
  assert list(t) == ['block_0']
  u = X + linear(p['out'], norm(p['norm1'], X))
  want = u + 0.5 * mlp(p['mlp'], norm(p['norm2'], u)) + 0.7 * adapter(t['block_0'], u)
  check(tuned, theta, variables, want)


def test_the_worked_example_of_adaptformer():
  u = jnp.array([[1.0, -1]])
  model = nn.Sequential([nn.Sequential([nn.LayerNorm(), lambda x: u])])
  tuned = jpeft.attach(
    model, adaptformer(1, blocks='layers_0', stream='layers_0/layers_0'), *_init(model, u)
  )
  t = {
    'down': {'kernel': jnp.array([[1.0], [0]]), 'bias': jnp.zeros(1)},
    'up': {'kernel': jnp.array([[2.0, 3]]), 'bias': jnp.zeros(2)},
  }
  theta = {'adaptformer': {'layers_0': t}}
  assert jax.tree.map(jnp.shape, theta) == jax.tree.map(jnp.shape, tuned.shapes)
  np.testing.assert_allclose(tuned.apply(theta, *_init(model, u)) - u, [[0.2, 0.3]], atol=1e-6)


def _init(model, x):
  return jax.jit(model.init)(jax.random.key(0), x), x


@pytest.mark.parametrize('post', [False, True], ids=['norms first', 'norms last'])
def test_houlsby_adapts_both_branches_before_the_residual(post):
  tuned, theta, t, variables, p = setup(houlsby(3, targets=f'{OUT}|{FC2}'), post)
  adapted = lambda path, h: h + adapter(t[path], h, gelu)
  if post:
    u = norm(p['norm1'], X + adapted(OUT, linear(p['out'], X)))
    want = norm(p['norm2'], u + adapted(FC2, mlp(p['mlp'], u)))
  else:
    u = X + adapted(OUT, linear(p['out'], norm(p['norm1'], X)))
    want = u + 0.5 * adapted(FC2, mlp(p['mlp'], norm(p['norm2'], u)))
  check(tuned, theta, variables, want)


def test_pfeiffer_adapts_what_leaves_a_block():
  tuned, theta, t, variables, p = setup(pfeiffer(2))
  u = X + linear(p['out'], norm(p['norm1'], X))
  y = u + 0.5 * mlp(p['mlp'], norm(p['norm2'], u))
  check(tuned, theta, variables, y + adapter(t['block_0'], y))


def test_pfeiffer_reads_behind_the_last_norm_and_adds_before_it():
  tuned, theta, t, variables, p = setup(pfeiffer(2, targets=END), post=True)
  u = norm(p['norm1'], X + linear(p['out'], X))
  z = u + mlp(p['mlp'], u)
  check(tuned, theta, variables, norm(p['norm2'], z + adapter(t[END], norm(p['norm2'], z))))


@pytest.mark.parametrize('scale', [4.0, 'learned'])
def test_parallel_reads_what_the_mlp_reads(scale):
  tuned, theta, t, variables, p = setup(parallel(3, scale, targets=MLP), post=True)
  u = norm(p['norm1'], X + linear(p['out'], X))
  s = np.asarray(t[MLP]['scale']) if scale == 'learned' else scale
  check(tuned, theta, variables, norm(p['norm2'], u + mlp(p['mlp'], u) + s * adapter(t[MLP], u)))


def test_parallel_at_scale_one_beside_the_identity_is_sequential():
  class Same(nn.Module):
    @nn.compact
    def __call__(self, x):
      return x

  make = lambda method: jpeft.attach(Same(), method, {'params': {}}, X)
  beside, behind = make(parallel(3, 1.0, '')), make(houlsby(3, '', 'relu'))
  t = noisy(beside.init(jax.random.key(0), {'params': {}})['parallel'], 0.5)
  np.testing.assert_allclose(
    beside.apply({'parallel': t}, {'params': {}}, X),
    behind.apply({'houlsby': t}, {'params': {}}, X),
    atol=1e-6,
  )


def test_gradients_scale_with_the_branch():
  grads = []
  for s in (1.0, 3.0):
    tuned, theta, _, variables, _ = setup(adaptformer(3, s, stream='block_0/norm2'))
    grads.append(jax.grad(lambda t: jnp.sum(jnp.sin(X) * tuned.apply(t, variables, X)))(theta))  # noqa: B023
  for one, three in zip(*map(jax.tree.leaves, grads), strict=True):
    np.testing.assert_allclose(three, 3 * one, rtol=1e-4, atol=1e-5)
    assert np.abs(one).max() > 1e-3


STARTS = {
  'lora': lambda t: (t['down']['kernel'].std() - (3 * 6) ** -0.5, np.abs(t['up']['kernel']).max()),
  'bert': lambda t: [t[n]['kernel'].std() - 0.02 for n in t],
  'houlsby': lambda t: [
    t[n]['kernel'].std() - 0.88e-3 for n in t
  ],  # a normal cut at two has 0.8796 of its std
}


@pytest.mark.parametrize('init', STARTS)
def test_starts(init):
  tuned, _, _, variables, _ = setup(houlsby(5000, OUT, init=init))
  t = jax.jit(tuned.init)(jax.random.key(0), variables)['houlsby'][OUT]
  widest = {'lora': 6**-0.5, 'bert': 0.2, 'houlsby': 2e-3}[init]
  assert np.abs(t['down']['kernel']).max() <= widest
  assert not any(t[n]['bias'].any() for n in t)
  np.testing.assert_allclose(STARTS[init](t), 0, atol=0.02 * widest)


def test_dropout_falls_on_the_bottleneck_in_training_only():
  tuned, theta, t, variables, _ = setup(adaptformer(4000, 1.0, 0.25, stream='block_0/norm2'))
  t = theta['adaptformer']['block_0']
  t['down'] = jax.tree.map(jnp.zeros_like, t['down']) | {'bias': jnp.ones(4000)}
  t['up'] = {
    'kernel': jnp.ones((4000, 6)),
    'bias': jnp.zeros(6),
  }  # the branch adds the sum of the bottleneck
  run = lambda **kw: tuned.apply(theta, variables, X, **kw) - Blocks().apply(variables, X)
  np.testing.assert_allclose(run(), 4000, rtol=1e-5)
  dropped = run(rngs={'dropout': jax.random.key(0)})
  np.testing.assert_allclose(dropped / 4000, 1, atol=0.05)
  assert len(np.unique(np.round(dropped))) > 1


BERT = {
  'model_type': 'bert',
  'vocab_size': 100,
  'hidden_size': 768,
  'num_hidden_layers': 12,
  'num_attention_heads': 12,
  'intermediate_size': 3072,
  'max_position_embeddings': 64,
}
BART_LARGE = {
  **BERT,
  'hidden_size': 1024,
  'num_hidden_layers': 24,
  'num_attention_heads': 16,
}  # its FFNs
VIT = {
  'model_type': 'vit',
  'hidden_size': 768,
  'num_hidden_layers': 12,
  'num_attention_heads': 12,
  'intermediate_size': 3072,
  'patch_size': 16,
  'image_size': 32,
}


@pytest.mark.parametrize(
  'config, method, count',
  [
    (BERT, houlsby(64), 2_379_264),
    (BERT, pfeiffer(16), 894_528),
    (BERT, pfeiffer(2), 7_091_712),
    (BART_LARGE, parallel(512), 25_202_688),
    (VIT, adaptformer(64), 1_189_632),
    (VIT, adaptformer(8), 156_768),
    (BERT, jpeft.chain(prefix(16), parallel(16)), 294_912 + 304_320),
  ],
)
def test_counts_of_the_papers(config, method, count):
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  model = jpeft.models.from_config(config, scan=True)
  model, shapes = full_size.of(model, images if config is VIT else full_size.tokens())
  assert jpeft.count(jpeft.attach(model, method, *shapes).shapes) == count


def test_adaptformer_where_norms_come_last_is_refused():
  model, shapes = full_size.of(jpeft.models.from_config(BERT, scan=True), full_size.tokens())
  with pytest.raises(ValueError, match=r"'bert' has no role \{norm2\}"):
    jpeft.attach(model, adaptformer(), *shapes)


def test_a_stream_outside_of_the_blocks():
  tuned, theta, _, variables, _ = setup(adaptformer(3, blocks=MLP, stream='block_0/norm2'))
  with pytest.raises(ValueError, match="'block_0/norm2', the stream, lies in no block"):
    tuned.apply(theta, variables, X)


def test_a_block_with_a_jit_of_its_own_is_refused():
  b = EDGES['nnx_jit']
  tuned = jpeft.attach(
    b.model, adaptformer(3, blocks=b.roles['block'], stream=r'blocks/\d+/fc1'), b.backbone, *b.args
  )
  theta = jax.jit(tuned.init)(jax.random.key(0), b.backbone)
  with pytest.raises(
    ValueError, match="'blocks/0' runs its inside under a jit or remat of its own"
  ):
    tuned.apply(theta, b.backbone, *b.args)


@pytest.mark.parametrize(
  'make, message',
  [
    (lambda: houlsby(0), 'houlsby: bottleneck=0 must be a whole number, at least 1'),
    (lambda: parallel(1.5), r'parallel: bottleneck=1.5'),
    (lambda: pfeiffer(-2), 'pfeiffer: reduction=-2 must be greater than 0'),
    (lambda: adaptformer(dropout=-0.1), r'adaptformer: dropout=-0.1 must lie in \[0, 1\]'),
    (lambda: adaptformer(scale='free'), "adaptformer: scale='free' must be a number or 'learned'"),
    (lambda: houlsby(activation='selu'), "houlsby: activation='selu' must be one of relu, gelu"),
    (lambda: houlsby(init='zero'), "houlsby: init='zero' must be one of lora, bert, houlsby"),
    (lambda: setup(pfeiffer(100)), 'pfeiffer: reduction=100 leaves nothing of a width of 6'),
  ],
)
def test_bad_hyperparameters(make, message):
  with pytest.raises(ValueError, match=message):
    make()
