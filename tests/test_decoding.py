"""What is written with a cache is what running the whole text for each token gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft import models
from jpeft.decoding import draw, generate, pad_left
from tests.fixtures import noisy
from tests.models.goldens import GOLDEN

PROMPTS = ([5, 9, 3, 40, 22, 7, 8], [11, 30], [6])
NEW = 9


def load(name):
  return models.load(GOLDEN / name, scan=name != 'mistral')


def by_hand(run, prompt):
  """Greedy tokens, one whole run without padding for each; the room behind the text is never
  seen.
  """
  text = list(prompt)
  for _ in range(NEW):
    room = np.zeros((1, len(PROMPTS[0]) + NEW), np.int32)
    room[0, : len(text)] = text
    text.append(int(run(room)[0, len(text) - 1].argmax()))
  return text[len(prompt) :]


@functools.cache
def plain():
  loaded = load('llama')
  return np.asarray(
    generate(loaded.model, loaded.variables, [PROMPTS[0]], new_tokens=NEW).tokens[0]
  ).tolist()


@pytest.mark.parametrize('name', ('llama', 'mistral'))
def test_padded_prompts_are_continued_as_alone_and_without_a_cache(name):
  loaded = load(name)
  tokens, mask = pad_left(PROMPTS, pad=17)
  with_cache = generate(loaded.model, loaded.variables, tokens, mask, new_tokens=NEW)
  run = jax.jit(lambda x: loaded.model.apply(loaded.variables, x))
  want = [by_hand(run, prompt) for prompt in PROMPTS]
  assert len({token for row in want for token in row}) > 5
  np.testing.assert_array_equal(with_cache.tokens, want)
  np.testing.assert_array_equal(with_cache.lengths, [NEW] * 3)
  without = generate(loaded.model, loaded.variables, tokens, mask, new_tokens=NEW, cache=False)
  np.testing.assert_array_equal(without.tokens, want)


@pytest.mark.parametrize(
  'method',
  (
    jpeft.lora(2, targets='{linear}'),
    jpeft.prefix(3),
    jpeft.lst(2, block='attention'),
    jpeft.vpt_deep(2),
    jpeft.vpt_shallow(2),
    jpeft.prompt_tuning(2),
  ),
  ids=lambda m: m.names[0],
)
def test_tuned_models_write_what_they_compute(method):
  loaded = load('llama')
  example = jnp.zeros((1, 8), jnp.int32)
  tuned = jpeft.attach(loaded.model, method, loaded.variables, example, mask=example)
  theta = noisy(jax.jit(tuned.init)(jax.random.key(0), loaded.variables), 0.3)
  run = jax.jit(lambda x: tuned.apply(theta, loaded.variables, x, mask=jnp.ones_like(x)))
  want = by_hand(run, PROMPTS[0])
  assert want != plain()
  tokens, mask = pad_left(PROMPTS[:2])
  got = generate(tuned, loaded.variables, tokens, mask, theta=theta, new_tokens=NEW)
  np.testing.assert_array_equal(got.tokens[0], want)


def test_a_text_ends_at_its_stop_token():
  loaded = load('qwen3')
  tokens, mask = pad_left(PROMPTS)
  free = np.asarray(generate(loaded.model, loaded.variables, tokens, mask, new_tokens=NEW).tokens)
  stop = (int(free[0, 2]), int(free[1, 4]))
  got = generate(loaded.model, loaded.variables, tokens, mask, new_tokens=NEW, stop=stop, pad=59)
  for row, length, all_ in zip(np.asarray(got.tokens), got.lengths.tolist(), free, strict=True):
    ends = [i for i, token in enumerate(all_) if token in stop]
    assert length == (ends[0] + 1 if ends else NEW)
    np.testing.assert_array_equal(row, [*all_[:length], *[59] * (NEW - length)])
  assert got.lengths[0] <= 3


def test_sampling_follows_key_and_temperature():
  loaded = load('qwen3')
  tokens, mask = pad_left(PROMPTS)
  run = lambda seed, **kwargs: np.asarray(
    generate(
      loaded.model,
      loaded.variables,
      tokens,
      mask,
      new_tokens=NEW,
      key=jax.random.key(seed),
      **kwargs,
    ).tokens
  )
  np.testing.assert_array_equal(run(0, temperature=1.0), run(0, temperature=1.0))
  assert (run(0, temperature=1.0) != run(1, temperature=1.0)).any()
  np.testing.assert_array_equal(run(0, temperature=1.0, top_p=1e-6), run(1))  # the likeliest alone


def test_draws_have_the_probabilities_of_the_nucleus():
  chance = np.array([0.05, 0.4, 0.15, 0.3, 0.1])
  logits = jnp.log(jnp.asarray(np.tile(chance, (20000, 1))))
  frequency = lambda **kwargs: (
    np.bincount(draw(jax.random.key(0), logits, **kwargs), minlength=5) / 20000
  )
  np.testing.assert_allclose(frequency(), chance, atol=0.015)
  nucleus = np.array([0, 0.4, 0.15, 0.3, 0]) / 0.85  # 0.4 + 0.3 is not yet 0.75
  np.testing.assert_allclose(frequency(top_p=0.75), nucleus, atol=0.015)
  np.testing.assert_allclose(frequency(temperature=0.5), chance**2 / (chance**2).sum(), atol=0.015)


@pytest.mark.parametrize(
  ('change', 'message'),
  (
    ({'new_tokens': 0}, 'new_tokens=0 must be at least 1'),
    ({'temperature': -1.0}, 'temperature=-1.0 must not be negative'),
    ({'top_p': 0.0}, 'top_p=0.0 must lie in'),
    ({'temperature': 0.7}, 'give a random key='),
    ({'mask': [[1, 1, 0]]}, 'padded on the left'),
    ({'mask': [[1, 1]]}, 'a mask of that shape'),
    ({'theta': {}}, 'theta goes with a Tuned'),
  ),
)
def test_impossible_requests_are_explained(change, message):
  model = models.Llama(8, 1, 2, 8, 10)
  with pytest.raises(ValueError, match=message):
    generate(model, {}, [[1, 2, 3]], **{'new_tokens': 2, **change})
  with pytest.raises(ValueError, match='each must have a token'):
    pad_left([[1], []])


@pytest.mark.parametrize('cache', (True, False), ids=('cached', 'uncached'))
@pytest.mark.parametrize('tuned', (True, False), ids=('tuned', 'bare'))
def test_logits_are_of_one_place_alone(tuned, cache):
  """Those of whole prompts, [B, N, V], are nowhere in the program."""
  loaded = load('llama')
  tokens, mask = pad_left(PROMPTS, pad=17)
  model, theta = loaded.model, None
  if tuned:
    model = jpeft.attach(loaded.model, jpeft.lora(2), loaded.variables, tokens, mask=mask)
    theta = model.init(jax.random.key(0), loaded.variables)

  def write(variables, tokens, mask):
    return generate(model, variables, tokens, mask, new_tokens=2, theta=theta, cache=cache).tokens

  program = jax.jit(write).lower(loaded.variables, tokens, mask).as_text()
  vocab = loaded.config['vocab_size']
  assert f'3x1x{vocab}x' in program
  for length in (tokens.shape[1], tokens.shape[1] + 2):
    assert f'3x{length}x{vocab}x' not in program
