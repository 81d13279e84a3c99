"""Experts: routing without drops, adapters and 4 bits of a stack of matrices, files, refusals."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jpeft
from jpeft import models, programs
from jpeft.decoding import generate
from jpeft.models.nn import Experts, SparseMLP
from jpeft.models.nn.experts import tiles_of
from jpeft.quant import Quantized
from tests.fixtures import noisy
from tests.models.goldens import GOLDEN, golden

# As published: mistralai/Mixtral-8x7B-v0.1.
MIXTRAL = {
  'model_type': 'mixtral',
  'hidden_size': 4096,
  'intermediate_size': 14336,
  'num_hidden_layers': 32,
  'num_attention_heads': 32,
  'num_key_value_heads': 8,
  'vocab_size': 32000,
  'num_local_experts': 8,
  'num_experts_per_tok': 2,
}
TOKENS = jax.ShapeDtypeStruct((1, 8), jnp.int32)


def all_experts(params, x, experts):
  """The same MLP, by every expert for every token."""
  shares = jax.nn.softmax(x @ params['router']['kernel'])
  weights, chosen = jax.lax.top_k(shares, experts.chosen)
  if experts.normalised:
    weights = weights / weights.sum(-1, keepdims=True)
  weights = (jax.nn.one_hot(chosen, experts.count) * weights[..., None]).sum(-2)
  gate, up, down = (params['experts'][name]['kernel'] for name in ('gate', 'fc1', 'fc2'))
  hidden = jax.nn.silu(jnp.einsum('bnd,edf->bnef', x, gate)) * jnp.einsum('bnd,edf->bnef', x, up)
  return jnp.einsum('bnef,efd,bne->bnd', hidden, down, weights)


@pytest.mark.parametrize('tokens,count,chosen', [(1, 5, 2), (40, 3, 1), (200, 4, 3)])
def test_every_token_is_in_a_tile_of_each_of_its_experts(tokens, count, chosen):
  rng = np.random.default_rng(0)
  # The last expert is popular, and one may be chosen by nobody.
  scores = rng.normal(size=(tokens, count)) + 3 * (np.arange(count) == count - 1)
  picked = np.argsort(-scores)[:, :chosen]
  tiles = tiles_of(jnp.asarray(picked), count)
  sources = np.asarray(tiles.sources).reshape(-1)
  of_row = np.repeat(tiles.groups, tiles.sources.shape[1])
  places = np.asarray(tiles.places)
  np.testing.assert_array_equal(sources[places], np.arange(tokens)[:, None].repeat(chosen, 1))
  np.testing.assert_array_equal(of_row[places], picked)
  assert (sources < tokens).sum() == tokens * chosen  # all other rows are empty


@pytest.mark.parametrize('normalised', [True, False])
def test_values_and_gradients_are_those_of_all_experts(normalised):
  experts = Experts(3, 2, normalised)
  mlp = SparseMLP(6, experts, jax.nn.silu)
  x = jax.random.normal(jax.random.key(0), (2, 40, 4))
  params = noisy(mlp.init(jax.random.key(1), x), 0.5)['params']

  def loss(run):
    return jax.jit(jax.value_and_grad(lambda p, x: (run(p, x) ** 2).sum(), (0, 1)))(params, x)

  got = loss(lambda p, x: mlp.apply({'params': p}, x))
  want = loss(lambda p, x: all_experts(p, x, experts))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4), got, want)


def test_flops_are_those_of_the_chosen_experts():
  tokens, width, hidden = 4096, 64, 96
  mlp = SparseMLP(hidden, Experts(8, 2), jax.nn.silu)
  x = jax.ShapeDtypeStruct((1, tokens, width), jnp.float32)
  params = jax.eval_shape(mlp.init, jax.random.key(0), x)
  counted = programs.flops(jax.jit(mlp.apply).trace(params, x)).all
  of_chosen = tokens * 2 * 3 * 2 * width * hidden
  router = tokens * 8 * 2 * width
  combined = tokens * 2 * 2 * width
  assert 1 <= (counted - router - combined) / of_chosen <= 1.25  # of all experts: 4


def lora_count(config, rank):
  model = models.from_config(config, scan=True)
  shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
  tuned = jpeft.attach(model, jpeft.lora(rank, targets='{fc1}|{fc2}'), shapes, TOKENS)
  return sum(x.size for x in jax.tree.leaves(tuned.shapes))


def test_lora_of_a_whole_mixtral_has_a_pair_for_each_expert():
  # Three maps of each expert, each r (4096 + 14336).
  assert lora_count(MIXTRAL, 8) == 32 * 8 * 3 * 8 * (4096 + 14336) == 113_246_208


@pytest.mark.parametrize('coded', [False, True])
def test_lora_acts_without_the_kernels_and_merges(coded):
  loaded = models.load(GOLDEN / 'qwen2_moe', quantize=jpeft.nf4() if coded else None)
  inputs, _ = golden('qwen2_moe')
  tokens = jnp.asarray(inputs['tokens'][:2])
  kernel = loaded.variables['params']['decoder']['block_0']['mlp']['experts']['fc1']['kernel']
  assert kernel.shape == (5, 12, 8) and isinstance(kernel, Quantized) == coded
  method = jpeft.lora(2, targets='{linear}')
  tuned = jpeft.attach(loaded.model, method, loaded.variables, tokens)
  site = tuned.sites['decoder/block_0/mlp/experts/fc1']
  assert site.leaves['kernel'].batch == (0,) and site.fields == ('grouped_dot',)
  theta = noisy(tuned.init(jax.random.key(0), loaded.variables), 0.2)
  own = theta['lora'][site.path]['kernel']
  assert own['a'].shape == (5, 12, 2) and own['b'].shape == (5, 2, 8)
  got = jax.jit(tuned.apply)(theta, loaded.variables, tokens)
  merged = tuned.merge(theta, loaded.variables)
  want = jax.jit(loaded.model.apply)(merged, tokens)
  np.testing.assert_allclose(got, want, atol=2e-5 * float(jnp.abs(want).max()))

  def step(theta):
    return jax.grad(lambda theta: (tuned.apply(theta, loaded.variables, tokens) ** 2).mean())(theta)

  gradient = jax.jit(step)(theta)['lora'][site.path]['kernel']
  assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradient))


def test_a_cache_changes_no_word_and_padding_none():
  loaded = models.load(GOLDEN / 'mixtral')
  inputs, _ = golden('mixtral')
  tokens = jnp.asarray(inputs['tokens'][:2, :6])
  mask = jnp.array([[1] * 6, [0, 0, 1, 1, 1, 1]])  # padded left
  found = generate(loaded.model, loaded.variables, tokens, mask=mask, new_tokens=4).tokens
  longer, seen = tokens, mask
  for _ in range(4):
    logits = loaded.model.apply(loaded.variables, longer, mask=seen)
    longer = jnp.concatenate([longer, logits[:, -1:].argmax(-1)], 1)
    seen = jnp.pad(seen, ((0, 0), (0, 1)), constant_values=1)
  np.testing.assert_array_equal(np.asarray(found)[:, -4:], longer[:, -4:])


def test_packed_texts_see_themselves_alone():
  loaded = models.load(GOLDEN / 'qwen3_moe')
  tokens = jnp.asarray(golden('qwen3_moe')[0]['tokens'][:1, :12])
  texts = jnp.array([[1] * 7 + [2] * 5])
  packed = jax.jit(loaded.model.apply)(loaded.variables, tokens, texts)
  alone = jax.jit(loaded.model.apply)(loaded.variables, tokens[:, 7:])
  np.testing.assert_allclose(packed[:, 7:], alone, atol=1e-5)


def test_shards_are_read_tensor_by_tensor(tmp_path):
  shutil.copy(GOLDEN / 'mixtral' / 'config.json', tmp_path)
  tensors = safetensors.numpy.load_file(GOLDEN / 'mixtral' / 'model.safetensors')
  keys = sorted(tensors)
  index = {}
  for number, part in enumerate((keys[::2], keys[1::2])):
    name = f'model-{number}.safetensors'
    safetensors.numpy.save_file({key: tensors[key] for key in part}, tmp_path / name)
    index |= dict.fromkeys(part, name)
  (tmp_path / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': index}))
  want = models.load(GOLDEN / 'mixtral', scan=True).variables
  jax.tree.map(np.testing.assert_array_equal, models.load(tmp_path, scan=True).variables, want)


def test_a_folder_with_a_config_alone_is_described(tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps(MIXTRAL))
  described = models.describe(tmp_path, quantize=jpeft.nf4(), scan=True)
  kernel = described.variables['params']['decoder']['blocks']['mlp']['experts']['fc2']['kernel']
  assert kernel.shape == (32, 8, 14336, 4096)
  assert described.model.rope.theta == 1e6 and described.model.eps == 1e-5


def test_some_blocks_have_one_mlp():
  config = json.loads((GOLDEN / 'qwen3_moe' / 'config.json').read_text())
  model = models.from_config(config)
  assert [own is not None for own in model.experts] == [True, False, True]
  assert model.mlp_dim == (8, 16, 8)
  every = models.from_config({**config, 'mlp_only_layers': [], 'decoder_sparse_step': 2})
  assert [own is not None for own in every.experts] == [False, True, False]


@pytest.mark.parametrize(
  'change,message',
  [
    ({'router_jitter_noise': 0.1}, 'router_jitter_noise=0.1 is not supported'),
    ({'num_local_experts': 0}, 'num_local_experts must be from 1'),
    ({'num_experts_per_tok': 9}, '9 experts of each token, and there are 8'),
    ({'num_local_experts': None}, "needs 'num_local_experts'"),
  ],
)
def test_what_is_refused(change, message):
  config = {key: value for key, value in {**MIXTRAL, **change}.items() if value is not None}
  with pytest.raises(ValueError, match=message):
    models.from_config(config)


def test_hidden_units_of_experts_are_not_cut():
  loaded = models.load(GOLDEN / 'mixtral')
  with pytest.raises(ValueError, match='experts'):
    jpeft.narrowed(loaded.model, loaded.variables, jpeft.Keep(mlp={0: range(4), 1: range(4)}))


SLOW = pytest.mark.slow
METHODS = {
  'ia3': jpeft.ia3(targets_in='{fc2}', targets_out='{k}|{v}'),
  'dora': jpeft.dora(2, targets='{fc1}|{fc2}'),
  'lokr': jpeft.lokr(targets='{fc1}|{fc2}'),
  'pfeiffer': jpeft.pfeiffer(2),
  'qst': jpeft.qst(reduction=2),
  'lst': jpeft.lst(reduction=1, block='own'),
}


@pytest.mark.parametrize(
  'name', [pytest.param(name, marks=() if name == 'ia3' else SLOW) for name in METHODS]
)
def test_methods_attach_and_train(name):
  loaded = models.load(GOLDEN / 'mixtral', scan=True)
  tokens = jnp.asarray(golden('mixtral')[0]['tokens'][:2])
  tuned = jpeft.attach(loaded.model, METHODS[name], loaded.variables, tokens)
  theta = noisy(tuned.init(jax.random.key(0), loaded.variables), 0.1)

  def loss(theta):
    return (tuned.apply(theta, loaded.variables, tokens) ** 2).mean()

  gradient = jax.jit(jax.grad(loss))(theta)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
  assert any(np.abs(x).max() > 0 for x in jax.tree.leaves(gradient))


@pytest.mark.slow
@pytest.mark.parametrize('remat', ['dots', 'packed'])
def test_blocks_run_again_in_the_backward_pass(remat):
  tokens = jnp.asarray(golden('mixtral')[0]['tokens'][:2])

  def gradient(**options):
    loaded = models.load(GOLDEN / 'mixtral', scan=True, **options)
    tuned = jpeft.attach(loaded.model, jpeft.lora(2), loaded.variables, tokens)
    theta = noisy(tuned.init(jax.random.key(0), loaded.variables), 0.1)
    loss = lambda theta: (tuned.apply(theta, loaded.variables, tokens) ** 2).mean()
    return jax.jit(jax.grad(loss))(theta)

  def close(a, b):
    np.testing.assert_allclose(a, b, atol=(1e-6 if remat == 'dots' else 0.1) * np.abs(b).max())

  jax.tree.map(close, gradient(remat=remat), gradient())
