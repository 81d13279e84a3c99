"""EVA: components of what enters layers, ranks by their shares, and LoRA of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.methods.weight import eva
from tests.fixtures import noisy
from tests.methods import small

RNG = np.random.default_rng(0)


def of_rows(x, columns):
  """(shares, components) of rows by the sums of two batches, y of some columns."""
  test = np.eye(x.shape[1]) if columns >= x.shape[1] else RNG.standard_normal((x.shape[1], columns))
  sums = [eva._sums(jnp.asarray(part), jnp.ones((len(part), 1)), test) for part in np.split(x, 2)]
  total = {name: sum(np.asarray(one[name], np.float64) for one in sums) for name in sums[0]}
  return eva.principal(total, test, 4)


@pytest.mark.parametrize('columns', (12, 40))
def test_components_are_those_of_the_covariance(columns):
  scales = 0.5 ** np.arange(20)
  turn = np.linalg.qr(RNG.standard_normal((20, 20)))[0]
  x = (RNG.standard_normal((64, 20)) * scales) @ turn + 3
  shares, components = of_rows(x.astype(np.float32), columns)
  _, singular, right = np.linalg.svd(x - x.mean(0), full_matrices=False)
  np.testing.assert_allclose(shares, (singular**2 / (singular**2).sum())[:4], rtol=1e-3)
  np.testing.assert_allclose(np.abs((components * right[:4]).sum(1)), 1, atol=1e-3)


def test_the_largest_shares_of_all_layers_get_the_budget():
  def layer(*shares):
    return np.array(shares), np.eye(3)[: len(shares)]

  found = eva.chosen({'one': [layer(0.6, 0.3), layer(0.1)], 'two': [layer(0.2, 0.05)]}, 1)
  assert found['ranks one'].tolist() == [2, 0] and found['ranks two'].tolist() == [1]
  np.testing.assert_array_equal(found['one'], [np.eye(3)[:2], np.zeros((2, 3))])


@pytest.mark.parametrize('scan', (False, True))
def test_a_pass_gives_ranks_and_starts(scan, tmp_path):
  model, held = small.vit(scan=scan)
  images = [RNG.standard_normal((4, 8, 8, 3)).astype(np.float32) for _ in range(3)]
  labels = np.zeros(4, np.int32)
  method = jpeft.eva(2, 6, '{q}|{fc2}', rho=2)
  method = jpeft.prepare(method, model, held, [(x, labels) for x in images])
  found = jpeft.found_in(method)
  ranks = np.concatenate([x for key, x in found.items() if '/ranks ' in key])
  assert ranks.sum() == 2 * 6 and ranks.max() <= 4 and found['eva/rows'] == 3 * 4 * 5
  tuned = jpeft.attach(model, method, held, small.IMAGES)
  theta = tuned.init(jax.random.key(0), held)
  out = jax.jit(tuned.apply)(theta, held, small.IMAGES)
  np.testing.assert_array_equal(out, jax.jit(model.apply)(held, small.IMAGES))
  assert any(x['kernel']['a'].any() for x in theta['eva'].values())

  theta = noisy(theta)
  merged = tuned.merge(theta, held)
  np.testing.assert_allclose(
    jax.jit(model.apply)(merged, small.IMAGES),
    jax.jit(tuned.apply)(theta, held, small.IMAGES),
    atol=1e-4,
  )


def test_padding_is_left_out():
  model, held = small.t5()
  mask = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
  waiting = jpeft.eva(2, targets='encoder/block_0/attention/query')
  inputs = {'tokens': small.TOKENS, 'decoder_tokens': small.TOKENS, 'mask': mask}
  labels = np.zeros((2, 6), np.int32)
  method = jpeft.prepare(waiting, model, held, [(inputs, labels)])
  assert jpeft.found_in(method)['eva/rows'] == 10


def test_keys_of_cross_attention_are_weighed_by_the_mask_of_the_encoder():
  model, held = small.t5()
  masks = {
    'mask': np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]),
    'decoder_mask': np.array([[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]]),
  }
  inputs = {'tokens': small.TOKENS, 'decoder_tokens': small.TOKENS, **masks}
  labels = np.zeros((2, 6), np.int32)
  for layer, rows in (
    ('cross_attention/key', 10),
    ('cross_attention/query', 5),
    ('attention/value', 5),
  ):
    waiting = jpeft.eva(2, targets=f'decoder/block_1/{layer}')
    method = jpeft.prepare(waiting, model, held, [(inputs, labels)])
    assert jpeft.found_in(method)['eva/rows'] == rows, layer


def test_what_it_cannot_read_is_told():
  with pytest.raises(ValueError, match='rho=0.5 must be at least 1'):
    jpeft.eva(rho=0.5)
  model, held = small.t5()
  with pytest.raises(ValueError, match="eva at 'embed': it reads what enters a layer"):
    batch = {'tokens': small.TOKENS, 'decoder_tokens': small.TOKENS}, np.zeros((2, 6), np.int32)
    jpeft.prepare(jpeft.eva(targets='embed'), model, held, [batch])
