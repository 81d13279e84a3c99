"""GPT-2 and OPT: sizes, positions, packed texts, caches, methods, meshes and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft import models, tasks, training
from jpeft.decoding import generate
from jpeft.tasks.pieces import in_pieces
from tests.fixtures import noisy
from tests.models.goldens import GOLDEN, golden

NAMES = ('gpt2', pytest.param('opt', marks=pytest.mark.slow), 'opt_350m')
GPT2 = {
  'model_type': 'gpt2',
  'n_embd': 768,
  'n_layer': 12,
  'n_head': 12,
  'vocab_size': 50257,
  'n_positions': 1024,
}
OPT_350M = {
  'model_type': 'opt',
  'hidden_size': 1024,
  'word_embed_proj_dim': 512,
  'num_hidden_layers': 24,
  'num_attention_heads': 16,
  'ffn_dim': 4096,
  'vocab_size': 50272,
  'max_position_embeddings': 2048,
  'do_layer_norm_before': False,
}
OPT_125M = {
  **OPT_350M,
  'hidden_size': 768,
  'word_embed_proj_dim': 768,
  'num_hidden_layers': 12,
  'num_attention_heads': 12,
  'ffn_dim': 3072,
  'do_layer_norm_before': True,
}


@pytest.mark.parametrize(
  'config,size',
  ((GPT2, 124_439_808), (OPT_125M, 125_239_296), (OPT_350M, 331_196_416)),
  ids=('gpt2', 'opt-125m', 'opt-350m'),
)
def test_models_have_the_published_size(config, size):
  model = models.from_config(config, scan=True)
  tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
  tree = jax.eval_shape(model.init, jax.random.key(0), tokens)
  assert sum(x.size for x in jax.tree.leaves(tree)) == size


@pytest.mark.parametrize(
  'name,scheme', (('gpt2', 'gpt'), ('opt', 'gpt'), ('opt_350m', 'gpt_post_norm'))
)
@pytest.mark.parametrize('scan', (False, True))
def test_roles_find_their_parts(name, scheme, scan):
  config = json.loads((GOLDEN / name / 'config.json').read_text())
  model = models.from_config(config, scan=scan)
  tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  sites = jpeft.sites_of(model, jax.eval_shape(model.init, jax.random.key(0), tokens), tokens)
  assert sites.anatomy.name == scheme and sites.anatomy.causal
  stack = 1 if scan else 2
  counts = {'q': 1, 'k': 1, 'v': 1, 'o': 1, 'fc1': 1, 'fc2': 1, 'linear': 6, 'norm': 2}
  counts |= {'block': 1, 'block_end': 1, 'attention': 1, 'mlp': 1}
  found = {role: len(sites.find(f'{{{role}}}')) for role in counts}
  assert found == {role: count * stack for role, count in counts.items()}
  assert len(sites.find('{embed}|{position}|{encoder}')) == 3
  assert sites.find('{attention}')[0].heads == (2, 6)


def variables_of(name):
  loaded = models.load(GOLDEN / name)
  return loaded.model, loaded.variables, jnp.asarray(golden(name)[0]['tokens'])


@pytest.mark.parametrize('name', NAMES)
def test_packed_and_padded_texts_are_those_alone(name):
  model, variables, tokens = variables_of(name)
  run = jax.jit(model.apply)
  texts = jnp.array([[0] * 2 + [1] * 7 + [2] * 9])
  packed = run(variables, tokens[:1], texts)[0]
  np.testing.assert_allclose(packed[2:9], run(variables, tokens[:1, 2:9])[0], atol=1e-6)
  np.testing.assert_allclose(packed[9:], run(variables, tokens[:1, 9:])[0], atol=1e-6)


@pytest.mark.parametrize('name', NAMES)
def test_a_cache_changes_no_word(name):
  """Of prompts padded on the left, and against the same prompt without padding."""
  model, variables, tokens = variables_of(name)
  tokens = tokens[:2, :8]
  mask = jnp.ones_like(tokens).at[1, :3].set(0)
  cached, plain = (
    generate(model, variables, tokens, mask, new_tokens=8, cache=cache).tokens
    for cache in (True, False)
  )
  np.testing.assert_array_equal(cached, plain)
  alone = generate(model, variables, tokens[1:, 3:], new_tokens=8, cache=False).tokens
  np.testing.assert_array_equal(cached[1], alone[0])


@pytest.mark.parametrize('name', NAMES)
def test_losses_are_made_in_pieces(name):
  model, variables, tokens = variables_of(name)
  tuned = jpeft.attach(model, jpeft.lora(2), variables, tokens)
  pieces, why = in_pieces(tuned, most=3 * 30 * 4)
  assert why == ''
  theta = noisy(tuned.init(jax.random.key(1), variables))
  labels = jnp.roll(tokens, -1, 1)

  def whole(theta):
    return tasks.loss(tuned.apply(theta, variables, tokens), labels).sum()

  def cut(theta):
    return pieces.apply(theta, variables, tokens, labels=labels)[..., 0].sum()

  found = [jax.jit(jax.value_and_grad(fn))(theta) for fn in (whole, cut)]
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), *found)


@pytest.mark.parametrize('name', NAMES)
def test_kernels_are_cut_over_a_mesh_by_their_roles(name):
  model, variables, tokens = variables_of(name)
  tuned = jpeft.attach(model, jpeft.lora(2), variables, tokens)
  theta = tuned.init(jax.random.key(0), variables)
  layout = training.Layout(tuned, training.mesh(1, 2), 'sharded', 1)
  placed = jax.device_put(variables, layout.of_backbone(variables))
  attention = placed['params']['decoder']['block_0']['attention']
  mlp = placed['params']['decoder']['block_0']['mlp']
  specs = [attention[part]['kernel'].sharding.spec for part in ('query', 'key', 'value', 'out')]
  specs += [mlp[part]['kernel'].sharding.spec for part in ('fc1', 'fc2')]
  columns, rows = (None, 'model'), ('model',)
  stripped = [tuple(spec) if spec[-1] is not None else tuple(spec)[:1] for spec in specs]
  assert stripped == [columns, columns, columns, rows, columns, rows]
  state = {'theta': theta, 'optimizer': optax.EmptyState()}
  spread = jax.device_put(theta, layout.of_state(state)['theta'])
  steered = layout.steered(tuned)
  got = jax.jit(lambda t, v: steered.apply(t, v, tokens))(spread, placed)
  np.testing.assert_allclose(got, tuned.apply(theta, variables, tokens), atol=1e-5)


@pytest.mark.parametrize('name', ('opt_350m', pytest.param('gpt2', marks=pytest.mark.slow)))
@pytest.mark.parametrize(
  'method',
  [
    pytest.param(jpeft.lst(reduction=2), marks=pytest.mark.slow),
    jpeft.prompt_tuning(2),
    pytest.param(jpeft.pfeiffer(2), marks=pytest.mark.slow),
  ],
  ids=['lst', 'prompt_tuning', 'pfeiffer'],
)
def test_methods_attach_and_train(name, method):
  model, variables, tokens = variables_of(name)
  tuned = jpeft.attach(model, method, variables, tokens)
  theta = jax.jit(tuned.init)(jax.random.key(0), variables)
  loss = lambda theta: jnp.square(tuned.apply(theta, variables, tokens)).mean()
  grads = jax.jit(jax.grad(loss))(theta)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  assert any(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


@pytest.mark.slow
def test_narrow_models_have_the_heads_that_are_kept():
  model, variables, tokens = variables_of('opt_350m')
  cut, fewer = jpeft.narrowed(model, variables, jpeft.Keep(layers=(0,), heads={0: (1,)}))
  attention = fewer['params']['decoder']['block_0']['attention']
  assert cut.heads == 1 and attention['query']['kernel'].shape == (12, 6)
  wide = variables['params']['decoder']['block_0']['attention']
  np.testing.assert_array_equal(attention['out']['kernel'], wide['out']['kernel'][6:])
  assert jax.eval_shape(cut.apply, fewer, tokens).shape == (3, 18, 30)


def test_a_prefix_of_peft_is_refused(tmp_path):
  """There a token's position counts the prefix."""
  loaded = models.load(GOLDEN / 'opt')
  tokens = golden('opt')[0]['tokens']
  tuned = jpeft.attach(loaded.model, jpeft.prefix(2), loaded.variables, tokens)
  theta = jax.eval_shape(tuned.init, jax.random.key(0), loaded.variables)
  theta = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), theta)
  with pytest.raises(ValueError, match='OPTForCausalLM counts its positions'):
    jpeft.save_adapter(tmp_path, loaded, theta, tuned=tuned)


def test_more_tokens_than_positions_are_refused():
  model, variables, tokens = variables_of('gpt2')
  with pytest.raises(ValueError, match='25 tokens are more than the 24 positions'):
    jax.eval_shape(model.apply, variables, jnp.ones((1, 25), jnp.int32))
  with pytest.raises(ValueError, match='26 tokens are more than the 24 positions'):
    generate(model, variables, tokens, new_tokens=8)


@pytest.mark.parametrize(
  'name, change, message',
  [
    ('gpt2', {'scale_attn_by_inverse_layer_idx': True}, 'scale_attn_by_inverse_layer_idx=True is'),
    ('gpt2', {'scale_attn_weights': False}, 'scale_attn_weights=False is not supported'),
    ('gpt2', {'add_cross_attention': True}, 'add_cross_attention=True is not supported'),
    ('opt', {'layer_norm_elementwise_affine': False}, 'layer_norm_elementwise_affine=False is'),
    ('opt', {'layerdrop': 0.1}, 'layerdrop=0.1 is not supported'),
    ('gpt2', {'n_head': 5}, 'a width of 12 cannot be shared by 5 heads'),
  ],
)
def test_what_is_not_supported_is_refused(name, change, message):
  config = json.loads((GOLDEN / name / 'config.json').read_text())
  with pytest.raises(ValueError, match=message):
    models.from_config({**config, **change})


@pytest.mark.parametrize('name', ('gemma2', 'opt_350m'))
def test_a_config_alone_describes_the_model(name, tmp_path):
  (tmp_path / 'config.json').write_text((GOLDEN / name / 'config.json').read_text())
  shapes = models.describe(tmp_path)
  loaded = models.load(GOLDEN / name)
  assert shapes.model == loaded.model
  same = lambda x, y: x.shape == y.shape and x.dtype == y.dtype
  assert jax.tree.all(jax.tree.map(same, shapes.variables, loaded.variables))
