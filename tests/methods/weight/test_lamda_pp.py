"""LaMDA++: energies, ranks within a mean, stacks, counts, and the stage without b."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.methods.weight.lamda_pp import energy, lamda_pp, ranks_of
from tests.fixtures import noisy
from tests.methods.golden import full_size
from tests.methods.small import IMAGES, vit

RNG = np.random.default_rng(0)
BATCHES = [(IMAGES, np.arange(2))]
PP = dict(rank=4, spread=0.5, targets='{q}|{fc1}|{fc2}')


def prepared(model, held, **hyperparameters):
  return jpeft.prepare(lamda_pp(**{**PP, **hyperparameters}), model, held, BATCHES)


def stacked(held):
  """The weights of three blocks as those of the scanned model."""
  encoder = held['params']['encoder']
  blocks = [encoder[f'block_{i}'] for i in range(3)]
  stack = jax.tree.map(lambda *x: jnp.stack(x), *blocks)
  rest = {name: x for name, x in encoder.items() if not name.startswith('block_')}
  return {'params': {**held['params'], 'encoder': {**rest, 'blocks': stack}}}


def test_the_energy_is_that_of_the_singular_values():
  for shape in ((9, 14), (14, 9), (3, 6, 5)):
    w = RNG.normal(size=shape).astype('float32')
    squares = np.linalg.svd(w, compute_uv=False) ** 2
    want = squares[..., :4].sum(-1) / squares.sum(-1)
    np.testing.assert_allclose(energy(jnp.asarray(w), 4), want, rtol=1e-5)
  assert energy(jnp.zeros((4, 4)), 2) == 0


def test_the_least_explained_third_gets_the_larger_rank():
  assert ranks_of([0.5, 0.9, 0.1, 0.4, 0.8, 0.2], 8, 4).tolist() == [8, 4, 12, 8, 4, 12]
  for count in (1, 2, 7, 8, 224):
    ranks = ranks_of(RNG.random(count), 32, 16)
    assert ranks.mean() == 32 and (ranks == 16).sum() == count // 3


def test_ranks_follow_the_kernels():
  model, held = vit()
  found = jpeft.found_in(prepared(model, held))
  kernels = {}
  for i in range(3):
    block = held['params']['encoder'][f'block_{i}']
    for part, layer in (('attention', 'query'), ('mlp', 'fc1'), ('mlp', 'fc2')):
      w = np.asarray(block[part][layer]['kernel'])
      w = w.reshape(32, -1) if layer != 'fc2' else w
      squares = np.linalg.svd(w, compute_uv=False) ** 2
      kernels[f'encoder/block_{i}/{part}/{layer}'] = squares[:4].sum() / squares.sum()
  ordered = sorted(kernels, key=kernels.__getitem__)
  want = dict(zip(ordered, [6, 6, 6, 4, 4, 4, 2, 2, 2], strict=True))
  assert {key.split()[1]: int(x[0]) for key, x in found.items()} == want
  tuned = jpeft.attach(model, jpeft.with_found(lamda_pp(**PP), found), held, IMAGES)
  assert set(tuned.shapes) == {'lamda_pp_2', 'lamda_pp_4', 'lamda_pp_6'}
  for path, rank in want.items():
    assert tuned.shapes[f'lamda_pp_{rank}'][path]['kernel']['m'].shape == (rank, rank)


def test_it_starts_as_the_backbone_and_merges():
  model, held = vit()
  tuned = jpeft.attach(model, prepared(model, held), held, IMAGES)
  theta = jax.jit(tuned.init)(jax.random.key(1), held)
  plain = jax.jit(model.apply)(held, IMAGES)
  np.testing.assert_allclose(jax.jit(tuned.apply)(theta, held, IMAGES), plain, atol=1e-5)
  moved = noisy(theta)
  out = jax.jit(tuned.apply)(moved, held, IMAGES)
  np.testing.assert_allclose(
    jax.jit(model.apply)(jax.jit(tuned.merge)(moved, held), IMAGES), out, atol=1e-5
  )
  assert jnp.abs(out - plain).max() > 1e-3


def test_layers_of_a_stack_have_ranks_of_their_own():
  model, held = vit()
  plain = jpeft.attach(model, prepared(model, held), held, IMAGES)
  scanned, stack = model.clone(scan=True), stacked(held)
  other = jpeft.attach(scanned, prepared(scanned, stack), stack, IMAGES)
  assert jpeft.summary(plain).trainable == jpeft.summary(other).trainable
  assert jpeft.summary(plain.at_stage(30, 100)).trainable == (
    jpeft.summary(other.at_stage(30, 100)).trainable
  )
  theta = jax.jit(other.init)(jax.random.key(1), stack)
  np.testing.assert_allclose(
    jax.jit(other.apply)(theta, stack, IMAGES), jax.jit(scanned.apply)(stack, IMAGES), atol=1e-5
  )
  # In some layers alone, among which the thirds are.
  own = jpeft.prepare(jpeft.in_layers(lamda_pp(**PP), '1:'), scanned, stack, BATCHES)
  ranks = np.concatenate([x for key, x in jpeft.found_in(own).items() if '/ranks ' in key])
  assert sorted(ranks) == [2, 2, 4, 4, 6, 6]
  chosen = jpeft.attach(scanned, own, stack, IMAGES)
  assert all(0 not in np.array(site.numbers)[list(site.chosen)] for _, site in chosen.rules)


def test_counts_on_llama_7b():
  """Thirds of 224 kernels: r out + r^2 of each, and r^2 alone after b is frozen."""
  llama = full_size.llama(32, 4096, 11008)
  tuned = jpeft.attach(llama.model, jpeft.stand_in(lamda_pp(32)), *llama.shapes)
  assert jpeft.summary(tuned).trainable == 43_745_280
  sites = [site for site in tuned.sites.find('{linear}') if site.matrices]
  found, trained, squares = {}, 0, 0
  for number, site in enumerate(sites):
    ranks = np.resize([16, 32, 48], site.layers)
    ranks = np.roll(ranks, number)
    found[f'lamda_pp/ranks {site.path}'] = ranks
    if site.axes:
      found[f'lamda_pp/numbers {site.path}'] = np.arange(site.layers)
    out = site.leaves[site.matrices[0]].fan_out
    trained += int((ranks * out + ranks**2).sum())
    squares += int((ranks**2).sum())
  method = jpeft.with_found(lamda_pp(32), found)
  tuned = jpeft.attach(llama.model, method, *llama.shapes)
  assert jpeft.summary(tuned).trainable == trained
  assert jpeft.summary(tuned.at_stage(300, 1000)).trainable == squares


@pytest.mark.parametrize(
  ('hyperparameters', 'message'),
  [
    ({'rank': 0}, 'rank must be a whole number'),
    ({'spread': 1}, 'lamda_pp: spread=1 must lie between 0 and 1'),
    ({'rank': 1, 'spread': 0.2}, 'lamda_pp: spread=0.2 moves no rank of 1'),
  ],
)
def test_hyperparameters_are_checked(hyperparameters, message):
  with pytest.raises(ValueError, match=message):
    lamda_pp(**hyperparameters)
