"""DePT: its scale and count, what it becomes without its parts, gradients by position, rates."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft import models
from jpeft.methods.prompt.dept import dept
from jpeft.methods.prompt.prompt_tuning import prompt_tuning
from jpeft.programs import flops
from tests.fixtures import noisy
from tests.methods.small import MASK, TOKENS, t5
from tests.models.goldens import GOLDEN, golden

SMALL = dict(tokens=2, rank=3, length=24, words=7)


def attached(name, method, **options):
  """(the backbone, the inputs, tuned, theta)."""
  loaded = models.load(GOLDEN / name, **options)
  inputs, _ = golden(name)
  tuned = jpeft.attach(loaded.model, method, loaded.variables, **inputs)
  return loaded, inputs, tuned, jax.jit(tuned.init)(jax.random.key(1), loaded.variables)


def entries(theta):
  """(path of the table, its entries)."""
  ((path, t),) = theta['dept'].items()
  return path, t


def test_the_scale():
  assert 8 / 45**0.5 == pytest.approx(1.1925696)
  loaded, inputs, tuned, theta = attached('bert', dept(**SMALL, alpha=5))
  path, t = entries(theta)
  b = jnp.ones_like(t['b'])
  other = {**t, 'b': b, 'prompts': t['prompts']}
  small = {**t, 'b': 2 * b, 'a': t['a'] / 2}
  np.testing.assert_allclose(
    tuned.apply({'dept': {path: other}}, loaded.variables, **inputs),
    tuned.apply({'dept': {path: small}}, loaded.variables, **inputs),
    atol=1e-6,
  )


def t5_base(method):
  model = models.T5(width=768, depth=2, heads=12, mlp_dim=3072, vocab=32128)
  words = jax.ShapeDtypeStruct((1, 256), jnp.int32)
  said = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  held = jax.eval_shape(model.init, jax.random.key(0), words, said)
  return jpeft.attach(model, method, held, words, said), held, words, said


def test_the_count_on_t5_base():
  """As many numbers as a prompt of 100 rows."""
  assert jpeft.summary(t5_base(dept(40, 45, 256))[0]).trainable == 76_800
  assert jpeft.summary(t5_base(prompt_tuning(100))[0]).trainable == 76_800


def test_a_step_costs_less_than_with_the_long_prompt():
  costs = []
  for method in (dept(40, 45, 256), prompt_tuning(100)):
    tuned, held, words, said = t5_base(method)
    step = jax.jit(
      jax.grad(lambda t, held, words, said, tuned=tuned: tuned.apply(t, held, words, said).sum())
    )
    costs.append(flops(step.trace(tuned.shapes, held, words, said)).all)
  assert costs[0] < 0.9 * costs[1]


@pytest.mark.parametrize('name', ['bert', 'llama', 't5'])
def test_without_a_change_it_is_prompt_tuning(name):
  loaded, inputs, tuned, theta = attached(name, dept(**SMALL))
  _, t = entries(theta)
  assert not jnp.any(t['b'])
  plain = jpeft.attach(loaded.model, prompt_tuning(2), loaded.variables, **inputs)
  ((where, _),) = plain.shapes['prompt_tuning'].items()
  of_prompts = {'prompt_tuning': {where: {'prompts': t['prompts']}}}
  np.testing.assert_array_equal(
    tuned.apply(theta, loaded.variables, **inputs),
    plain.apply(of_prompts, loaded.variables, **inputs),
  )


@pytest.mark.parametrize('name', ['bert', 'llama'])
def test_without_prompts_it_starts_as_the_backbone(name):
  loaded, inputs, tuned, theta = attached(name, dept(0, 3, 24))
  np.testing.assert_array_equal(
    tuned.apply(theta, loaded.variables, **inputs), loaded.model.apply(loaded.variables, **inputs)
  )


def test_gradients_belong_to_positions():
  """Of a model that is its table alone: dA_t follows from position t, dB from all of them."""

  class Table(nn.Module):
    @nn.compact
    def __call__(self, tokens):
      return nn.Embed(20, 4, name='embed')(tokens)

  model = Table()
  tokens = jnp.array([[3, 1, 4], [1, 5, 9]])
  variables = model.init(jax.random.key(0), tokens)
  tuned = jpeft.attach(model, dept(0, 2, 5, alpha=3, embed='embed'), variables, tokens)
  theta = noisy(tuned.init(jax.random.key(0), variables), 0.3)
  path, t = entries(theta)
  g = jax.random.normal(jax.random.key(1), (2, 3, 4))
  grads = jax.grad(lambda theta: jnp.sum(g * tuned.apply(theta, variables, tokens)))(theta)
  scale = 3 / 2**0.5
  of_positions = jnp.zeros((5, 4)).at[:3].set(g.sum(0))
  np.testing.assert_allclose(entries(grads)[1]['a'], scale * of_positions @ t['b'].T, atol=1e-5)
  np.testing.assert_allclose(entries(grads)[1]['b'], scale * t['a'].T @ of_positions, atol=1e-5)


def test_a_decoders_words_are_not_changed():
  model, variables = t5()
  tuned = jpeft.attach(model, dept(**SMALL), variables, TOKENS, TOKENS)
  theta = noisy(tuned.init(jax.random.key(0), variables), 0.3)
  path, t = entries(theta)
  plain = jpeft.attach(model, prompt_tuning(2), variables, TOKENS, TOKENS)
  changed = jax.tree.map(jnp.asarray, variables)
  # The same words in the encoder, changed by hand, through a table of one row a word and position.
  longer = jnp.arange(50, 56)[None] + 6 * jnp.arange(2)[:, None]
  table = changed['params']['embed']['embedding']
  rows = table[TOKENS] + 8 / 3**0.5 * (t['a'][:6] @ t['b'])
  changed['params']['embed']['embedding'] = jnp.concatenate([table, rows.reshape(12, -1)])
  wide, _ = t5(vocab=62)
  of_wide = jpeft.attach(wide, prompt_tuning(2), changed, longer, TOKENS)
  of_prompts = {'prompt_tuning': {path: {'prompts': t['prompts']}}}
  out = tuned.apply(theta, variables, TOKENS, TOKENS, MASK)
  expected = of_wide.apply(of_prompts, changed, longer, TOKENS, MASK)[..., :50]
  np.testing.assert_allclose(out, expected, atol=1e-4)
  unchanged = plain.apply(of_prompts, variables, TOKENS, TOKENS, MASK)
  assert np.abs(out - unchanged).max() > 1e-3


def test_two_rates_of_one_schedule():
  loaded, inputs, tuned, theta = attached('bert', dept(**SMALL))
  rate = jpeft.optim.schedule('linear', 1e-3, 10)
  tx = jpeft.optim.optimizer(tuned, theta, rate, name='sgd', b1=0, groups=[('.*/prompts', 100.0)])
  ones = jax.tree.map(jnp.ones_like, theta)
  state = tx.init(theta)
  for step in range(3):
    updates, state = tx.update(ones, state, theta)
    _, u = entries(updates)
    np.testing.assert_allclose(u['prompts'], -100 * rate(step), rtol=1e-5)
    np.testing.assert_allclose(u['a'], -rate(step), rtol=1e-5)
  assert isinstance(tx, optax.GradientTransformation)


def test_the_sequence_has_so_many_rows_more():
  loaded, inputs, _, _ = attached('bert', dept(**SMALL))
  seen = []

  def note(t, call, x, *args, **kwargs):
    seen.append(x.shape[1])
    return call(x, *args, **kwargs)

  method = jpeft.chain(dept(**SMALL), jpeft.at('{block}', jpeft.Call('note', note)))
  tuned = jpeft.attach(loaded.model, method, loaded.variables, **inputs)
  theta = tuned.init(jax.random.key(0), loaded.variables)
  seen.clear()
  tuned.apply(theta, loaded.variables, **inputs)
  assert set(seen) == {2 + inputs['tokens'].shape[1]}


def test_what_cannot_be_is_refused():
  loaded, inputs, tuned, theta = attached('bert', dept(2, 3, 4))
  with pytest.raises(ValueError, match='dept: length=4 words of a text have a change, and a text'):
    tuned.apply(theta, loaded.variables, **inputs)
  with pytest.raises(ValueError, match='dept: in an encoder-decoder .* tokens must be at least 1'):
    attached('t5', dept(0, 3, 24))


@pytest.mark.parametrize(
  'wrong', ({'tokens': -1}, {'rank': 0}, {'length': 0}, {'alpha': 0}, {'init': 'x'}, {'dropout': 2})
)
def test_hyperparameters_out_of_range_are_refused(wrong):
  with pytest.raises(ValueError, match=f'dept: {next(iter(wrong))}='):
    dept(**wrong)
