"""What cannot be attached, and what theta or backbone does not belong, is said in one sentence."""

import jax
import pytest
from flax import nnx

import jpeft
from tests.core.small import Blocks, NnxBlocks, X, adapter, backbone, gain, low_rank, shift, train


def attach(method, model=None, held=None):
  model = model or Blocks()
  return jpeft.attach(model, method, backbone(model) if held is None else held, X)


@pytest.mark.parametrize(
  ('pattern', 'message'),
  [
    ('blok_0/fc', r"low: no site matches: 'blok_0/fc'. Near it, of 7 sites: block_0/fc"),
    ('.*/kernel', r'no site matches'),
    (
      'block_1',
      r"1 sites match, but none has what it adapts: 'block_1'. Near it, of 7 sites: block_1",
    ),
    ('fc', r'no site matches.*block_\d/fc'),  # a pattern is of whole paths
  ],
)
def test_a_pattern_without_a_site(pattern, message):
  with pytest.raises(ValueError, match=message):
    attach(low_rank(pattern))


def test_a_site_twice_under_one_name():
  with pytest.raises(
    ValueError, match="two rules called 'gain' meet at 'block_0/fc'; give one .* name="
  ):
    attach(jpeft.chain(gain('block_0/fc'), gain('.*/fc')))
  both = attach(jpeft.chain(gain('block_0/fc'), gain('block_[12]/fc'), gain('.*/fc', 'other')))
  assert {n: len(sites) for n, sites in both.shapes.items()} == {'gain': 3, 'other': 3}


def test_what_init_refuses_is_said_at_attach():
  def init(key, site, arrays):
    raise ValueError('rank=9 is more than 6')

  with pytest.raises(ValueError, match='rank=9'):
    attach(jpeft.at('.*/fc', jpeft.Weight('w', init, lambda t, site, p: p)))


@pytest.mark.parametrize(
  ('model', 'held', 'message'),
  [
    (Blocks(), {'kernel': X}, "a dict with the key 'params'; got the keys \\['kernel'\\]"),
    (
      NnxBlocks(2),
      nnx.state(NnxBlocks(3)),
      "nnx.state\\(model\\); this model has no 'blocks/2/fc/",
    ),
  ],
)
def test_a_backbone_of_something_else(model, held, message):
  with pytest.raises(ValueError, match=message):
    attach(gain('.*fc'), model, held)


def test_a_model_of_something_else():
  with pytest.raises(TypeError, match='jpeft adapts Flax modules, Linen or NNX; got function'):
    attach(gain('.*'), lambda x: x, {'params': {}})


@pytest.mark.parametrize('make', [Blocks, NnxBlocks])
@pytest.mark.parametrize(
  'method', [gain('.*/fc'), train('.*/fc'), shift('.*/fc')], ids=['fused', 'boxed', 'call']
)
def test_theta_of_another_method(make, method):
  model = make()
  held = backbone(model)
  tuned, other = (jpeft.attach(model, m, held, X) for m in (method, adapter('.*/fc')))
  theta = jax.jit(other.init)(jax.random.key(0), held)
  name = tuned.method.names[0]
  with pytest.raises(ValueError, match=f"no entry '{name}' for .*it holds adapter.*another method"):
    tuned.apply(theta, held, X)
  if tuned.mergeable:
    with pytest.raises(ValueError, match='another method'):
      tuned.merge(theta, held)


def test_what_cannot_be_merged_names_the_rule_and_the_site():
  tuned = attach(jpeft.chain(gain('.*/fc'), adapter('block_1')))
  assert not tuned.mergeable and tuned.only('gain').mergeable
  with pytest.raises(
    ValueError, match="adapter at 'block_1' changes the computation, not the weights"
  ):
    tuned.merge(tuned.shapes, tuned.backbone)
