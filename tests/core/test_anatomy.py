"""Roles: what a model family calls its parts, and what is said when nobody knows."""

import flax.linen as nn
import jax
import numpy as np
import pytest

import jpeft
from tests.core.small import Blocks, X, backbone, gain
from tests.fixtures import BACKBONES


@pytest.fixture
def mine():
  """The blocks of the small models, described by their user."""
  anatomy = jpeft.Anatomy(
    'mine',
    {'block': r'block_\d', 'fc1': r'block_\d/fc', 'last': 'block_2'},
    lead=2,
    causal=True,
    exit='last',
  )
  jpeft.register_anatomy(anatomy)
  yield anatomy
  del jpeft.ANATOMIES['mine']


def attach(targets):
  model = Blocks()
  return jpeft.attach(model, gain(targets), backbone(model), X)


def test_roles_stand_for_the_names_of_the_family(mine):
  tuned = attach('{fc1}')
  assert tuned.sites.anatomy is mine
  assert [site.path for _, site in tuned.rules] == ['block_0/fc', 'block_1/fc', 'block_2/fc']
  assert [s.path for s in tuned.sites.find('{exit}')] == ['block_2']
  assert [s.path for s in tuned.sites.find('{last}/fc|block_0')] == ['block_0', 'block_2/fc']
  assert [s.path for s in tuned.sites.find(r'block_\d{1}/fc')] == [
    'block_0/fc',
    'block_1/fc',
    'block_2/fc',
  ]


def test_a_role_that_the_family_does_not_have(mine):
  with pytest.raises(
    ValueError, match=r"'mine' has no role \{fc2\}, only block, .*; did you mean \{fc1\}\?"
  ):
    attach('{fc2}')


def test_a_model_that_no_family_fits():
  model = nn.Sequential([nn.Dense(3)])
  with pytest.raises(ValueError, match=r'uses the role \{q\}.*layers_0.*jpeft.register_anatomy'):
    jpeft.attach(model, gain('{q}'), backbone(model), X)


def test_an_own_anatomy_of_a_known_name_replaces_it():
  known = dict(jpeft.ANATOMIES)
  try:
    jpeft.register_anatomy(jpeft.Anatomy('vit', {'block': 'x'}))
    assert len(jpeft.ANATOMIES) == len(known) and jpeft.ANATOMIES['vit'].roles == {'block': 'x'}
    assert next(iter(jpeft.ANATOMIES)) == 'vit'
  finally:
    jpeft.ANATOMIES.clear()
    jpeft.ANATOMIES.update(known)


@pytest.mark.parametrize(
  ('name', 'family'),
  [
    ('linen_vit', 'vision_transformer'),
    ('linen_vit_scan', 'vision_transformer'),
    ('nnx_llama', 'decoder'),
    ('linen_gemma', 'decoder'),
    ('nnx_raw', 'decoder'),
  ],
)
def test_third_parties_are_recognised(name, family):
  b = BACKBONES[name]
  sites = jpeft.sites_of(b.model, b.backbone, *b.args, **b.kwargs)
  anatomy = sites.anatomy
  assert (anatomy.name, anatomy.causal, anatomy.lead) == (family, b.causal, b.lead)
  for role in ('block', 'attention', 'mlp', 'q', 'v', 'norm'):
    found = {s.path for s in sites.find(f'{{{role}}}')}
    assert found or name == 'nnx_raw' and role in 'qv', role


class Pipeline(nn.Module):
  """Blocks under a name that families use, with few of their parts."""

  @nn.compact
  def __call__(self, x):
    for i in range(2):
      x = nn.relu(nn.Dense(6, name=f'block_{i}')(x))
    return nn.Dense(3, name='head')(x)


def test_a_family_of_which_little_is_there_is_not_taken():
  model = Pipeline()
  sites = jpeft.sites_of(model, backbone(model), X)
  assert sites.anatomy is None
  with pytest.raises(ValueError, match='no known anatomy fits this model'):
    jpeft.attach(model, gain('{block}'), backbone(model), X)


class Generic(nn.Module):
  """Blocks whose names several families have."""

  tokens: bool

  @nn.compact
  def __call__(self, x):
    if self.tokens:
      x = nn.Embed(11, 6, name='embed')(x)
    for i in range(2):
      attention = nn.MultiHeadDotProductAttention(2, name=f'attention_{i}')
      x = x + attention(x)
      x = nn.Dense(6, name=f'block_{i}_fc')(x)
    return nn.Dense(3, name='head')(x)


def generic(causal):
  return jpeft.Anatomy(
    f'generic {causal}',
    {'block': r'block_\d_fc', 'head': 'head', 'one': 'no', 'two': 'no'},
    causal=causal,
    lead=1 - causal,
  )


def test_families_that_fit_alike_are_told_where_it_matters():
  x = np.ones((2, 5, 6), np.float32)
  tokens = np.ones((2, 5), np.int32)
  for causal in (False, True):
    jpeft.register_anatomy(generic(causal))
  try:
    read = lambda model, x: jpeft.sites_of(model, model.init(jax.random.key(0), x), x)
    sites = read(Generic(True), tokens)
    assert sites.find('{block}') and sites.lead == 1
    with pytest.raises(ValueError, match="fit the families 'generic .*in what a token"):
      sites.causal  # noqa: B018
    # A decoder reads tokens.
    assert read(Generic(False), x).causal is False
  finally:
    for causal in (False, True):
      del jpeft.ANATOMIES[f'generic {causal}']


def test_a_vision_model_is_not_taken_for_a_decoder():
  b = BACKBONES['nnx_vit_scan']
  sites = jpeft.sites_of(b.model, b.backbone, *b.args, **b.kwargs)
  assert sites.anatomy.name == 'vit' and not sites.causal and sites.lead == 1


def test_a_pattern_without_a_match_names_the_family():
  b = BACKBONES['linen_gemma']
  with pytest.raises(ValueError, match="the model is taken for a 'decoder'; describe one of your"):
    jpeft.attach(b.model, gain('{head}'), b.backbone, *b.args, **b.kwargs)
