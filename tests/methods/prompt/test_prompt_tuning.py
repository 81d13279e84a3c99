"""Prompt tuning: the rows are words that only the table lacks."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft import models
from jpeft.methods.prompt.prompt_tuning import prompt_tuning
from tests.methods.small import TOKENS, t5
from tests.models.goldens import GOLDEN, golden

P = 3


def attached(name, method, **options):
  """(the backbone, the inputs, tuned, theta)."""
  loaded = models.load(GOLDEN / name, **options)
  inputs, _ = golden(name)
  tuned = jpeft.attach(loaded.model, method, loaded.variables, **inputs)
  return loaded, inputs, tuned, jax.jit(tuned.init)(jax.random.key(1), loaded.variables)


def by_words(loaded, inputs, rows, name):
  """What the model computes with the rows as words of a longer table, before the others."""
  path = {'bert': ('embed', 'word'), 'roberta': ('embed', 'word')}.get(name, ('embed',))
  variables = jax.tree.map(jnp.asarray, loaded.variables)
  table = variables['params']
  for part in path:
    table = table[part]
  vocab = len(table['embedding'])
  table['embedding'] = jnp.concatenate([table['embedding'], rows])
  ids = vocab + np.arange(len(rows))

  def front(x, values):
    return np.concatenate([np.broadcast_to(values, (len(x), P)), x], 1)

  longer = {key: front(x, 1) for key, x in inputs.items() if key == 'mask'}
  longer['tokens'] = front(inputs['tokens'], ids)
  if 'types' in inputs:
    longer['types'] = front(inputs['types'], 0)
  if 'decoder_tokens' in inputs:
    longer['decoder_tokens'] = inputs['decoder_tokens']
  model = dataclasses.replace(loaded.model, vocab=vocab + len(rows))
  out = model.apply(variables, **longer)
  if out.ndim == 2:
    return out
  spoken = 'decoder_tokens' if 'decoder_tokens' in inputs else 'tokens'
  return out[:, longer[spoken].shape[1] - inputs[spoken].shape[1] :, :vocab]


@pytest.mark.parametrize('name', ('bert', 'roberta', 't5', 't5_tokens', 'qwen3'))
def test_rows_are_words_that_only_the_table_lacks(name):
  method = prompt_tuning(P, words=7)
  loaded, inputs, tuned, theta = attached(name, method, scan=name == 'qwen3')
  (rows,) = jax.tree.leaves(theta)
  assert len(rows) == P
  np.testing.assert_allclose(
    tuned.apply(theta, loaded.variables, **inputs),
    by_words(loaded, inputs, rows, name),
    atol=2e-5,
  )


def test_rows_start_as_the_first_words():
  loaded, _, _, theta = attached('llama', prompt_tuning(20, words=2))
  (rows,) = jax.tree.leaves(theta)
  first = np.asarray(loaded.variables['params']['embed']['embedding'])[:2]
  found = {int(np.argmin(np.abs(first - row).sum(1))) for row in np.asarray(rows)}
  assert found == {0, 1}
  assert all(np.abs(first - row).sum(1).min() == 0 for row in np.asarray(rows))


def test_no_rows_leave_the_model_as_it_is():
  loaded, inputs, tuned, theta = attached('bert', prompt_tuning(0))
  np.testing.assert_array_equal(
    tuned.apply(theta, loaded.variables, **inputs), loaded.model.apply(loaded.variables, **inputs)
  )


def test_one_array_may_be_the_words_of_both_sides():
  model, variables = t5()
  tuned = jpeft.attach(model, prompt_tuning(P), variables, TOKENS, TOKENS)
  theta = tuned.init(jax.random.key(0), variables)
  one = tuned.apply(theta, variables, TOKENS, TOKENS)
  two = tuned.apply(theta, variables, TOKENS, jnp.array(TOKENS))
  np.testing.assert_array_equal(one, two)


class Marked(nn.Module):
  """Reads words, and weights of theirs that no name explains."""

  @nn.compact
  def __call__(self, tokens, weights):
    return nn.Embed(9, 4, name='embed')(tokens) * weights[..., None]


@pytest.mark.parametrize(
  'method, name, message',
  (
    (prompt_tuning(P), 'vit', r'words, integers \[B, N\], and ViT is called with float32'),
    (prompt_tuning(P, embed='final_norm'), 'llama', 'names no module with a table'),
  ),
)
def test_models_without_words_are_refused_at_attach(method, name, message):
  with pytest.raises(ValueError, match=message):
    attached(name, method)


def test_an_argument_of_which_nothing_is_known_is_told():
  tokens, weights = jnp.zeros((2, 5), int), jnp.ones((2, 5, 7))
  model = Marked()
  variables = model.init(jax.random.key(0), tokens, weights[..., 0])
  tuned = jpeft.attach(model, prompt_tuning(P, embed='embed'), variables, tokens, weights[..., 0])
  theta = tuned.init(jax.random.key(0), variables)
  with pytest.raises(ValueError, match=r'nothing is known of what it would be for 3 more'):
    tuned.apply(theta, variables, tokens, weights)


@pytest.mark.parametrize('wrong', ({'tokens': -1}, {'words': 0}, {'init': 'x'}, {'dropout': 2}))
def test_hyperparameters_out_of_range_are_refused(wrong):
  with pytest.raises(ValueError, match=f'prompt_tuning: {next(iter(wrong))}='):
    prompt_tuning(**wrong)
