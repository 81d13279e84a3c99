"""What callers may ask for, what they are told when they cannot have it, and exact sizes."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpeft import models
from jpeft.models.kin import KIN
from jpeft.models.nn.layers import Attention
from jpeft.models.pretrained import FAMILIES
from tests.models.goldens import GOLDEN, outputs

T5 = {
  'base': (768, 12, 12, 3072, 64),
  'large': (1024, 24, 16, 4096, 64),
  '3b': (1024, 24, 32, 16384, 128),
}


def size(config, *inputs):
  model = models.from_config(config, scan=True)
  tree = jax.eval_shape(model.init, jax.random.key(0), *inputs)
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
  'name,published,paper',
  (
    ('base', 222_903_552, 222_882_048),
    ('large', 737_668_096, 737_639_424),
    ('3b', 2_851_598_336, 2_851_569_664),
  ),
)
def test_t5_has_the_published_size(name, published, paper):
  """Ladder side-tuning (arXiv:2206.06522) counts the tokenizer's 32,100 words, files hold 32,128
  rows.
  """
  width, depth, heads, mlp, head = T5[name]
  config = {
    'model_type': 't5',
    'd_model': width,
    'num_layers': depth,
    'num_heads': heads,
    'd_ff': mlp,
    'd_kv': head,
  }
  tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
  assert size(config | {'vocab_size': 32128}, tokens, tokens) == published
  assert size(config | {'vocab_size': 32100}, tokens, tokens) == paper
  assert published - paper == 28 * width


def test_vit_and_bert_have_the_published_sizes():
  vit = {
    'model_type': 'vit',
    'hidden_size': 768,
    'num_hidden_layers': 12,
    'num_attention_heads': 12,
    'intermediate_size': 3072,
    'patch_size': 16,
    'image_size': 224,
  }
  assert size(vit, jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)) == 85_798_656
  bert = vit | {'model_type': 'bert', 'vocab_size': 30522, 'max_position_embeddings': 512}
  assert (
    size(bert, jax.ShapeDtypeStruct((1, 8), jnp.int32)) == 109_482_240 - 590_592
  )  # without pooler


@pytest.mark.parametrize('pool,width', (('cls', 24), ('mean', 24), ('cls_mean', 48)))
def test_without_a_head_the_model_returns_what_a_head_would_read(pool, width):
  images = np.load(GOLDEN / 'dinov2' / 'golden.npz')['images']
  tokens = models.load(GOLDEN / 'dinov2', pool='tokens')
  x = outputs(tokens, {'images': images})
  want = {'cls': x[:, 0], 'mean': x[:, 1:].mean(1)}
  want['cls_mean'] = np.concatenate([want['cls'], want['mean']], -1)
  loaded = models.load(GOLDEN / 'dinov2', pool=pool, num_classes=4)
  head = loaded.variables['params']['head']
  assert head['kernel'].shape == (width, 4)
  logits = outputs(loaded, {'images': images})
  np.testing.assert_allclose(logits, want[pool] @ head['kernel'], atol=1e-5)


def test_a_sentence_embedding_is_the_masked_mean():
  arrays = np.load(GOLDEN / 'bert' / 'golden.npz')
  hidden = models.load(GOLDEN / 'bert', pool='tokens')
  inputs = {'tokens': arrays['tokens'], 'mask': arrays['mask']}
  x = outputs(hidden, inputs)
  headed = models.load(GOLDEN / 'bert', pool='mean', num_classes=24)
  assert 'pooler' not in headed.variables['params']
  headed.variables['params']['head']['kernel'] = np.eye(24, dtype='float32')
  got = outputs(headed, inputs)
  want = [row[:n].mean(0) for row, n in zip(x, arrays['mask'].sum(1), strict=True)]
  np.testing.assert_allclose(got, np.stack(want), atol=1e-5)


@pytest.mark.parametrize(
  'request_,message',
  (
    (
      {'image_size': 30},
      'image_size 30 is no multiple of the patch size 7; the nearest that is: 28',
    ),
    ({'pool': 'max'}, "pool 'max' is none of"),
    ({'pool': 'tokens', 'num_classes': 3}, "pool 'tokens' has no single feature"),
    ({'layers': 0}, 'layers=0 is not between 1 and the 2 blocks'),
  ),
)
def test_impossible_requests_are_explained(request_, message):
  with pytest.raises(ValueError, match=message):
    models.load(GOLDEN / 'vit', **request_)


def test_t5_takes_no_classes():
  with pytest.raises(ValueError, match="a t5 model has no head 'classification' .* 'tokens'"):
    models.load(GOLDEN / 't5', num_classes=2)


def test_configs_that_say_too_little_or_the_unknown_are_explained():
  with pytest.raises(ValueError, match="config of a vit model needs 'hidden_size'"):
    models.from_config({'model_type': 'vit'})
  config = json.loads((GOLDEN / 'vit' / 'config.json').read_text())
  with pytest.raises(ValueError, match="activation 'gleu' is none of gelu"):
    models.from_config(config | {'hidden_act': 'gleu'})


@pytest.mark.parametrize(
  ('name', 'change', 'message'),
  [
    ('vit', {'hidden_size': '24'}, 'hidden_size must be an integer of 64 bits, not "24"'),
    ('vit', {'num_hidden_layers': 10**9}, 'num_hidden_layers must be from 1 to 4096, not'),
    ('vit', {'num_attention_heads': 5}, 'a width of 24 cannot be shared by 5 heads'),
    ('vit', {'architectures': 3}, 'architectures must be a list or null, not 3'),
    ('vit', {'image_size': [28]}, 'image_size must be one number or two'),
    ('bert', {'hidden_dropout_prob': 2}, 'hidden_dropout_prob must be from 0 to 1, not 2'),
    ('bert', {'hidden_act': ['gelu']}, 'hidden_act must be a text, not a list of 1'),
    ('llama', {'rope_parameters': 7}, 'rope_parameters must be an object or null, not 7'),
    ('llama', {'num_key_value_heads': 3}, 'heads cannot share 3 heads of keys'),
    ('llama', {'jpeft_sizes': {'width': 3}}, "jpeft_sizes of the config has 'width'"),
    ('llama', {'jpeft_sizes': {'heads': ['a']}}, "'heads' in jpeft_sizes of the config has 'a'"),
    ('t5', {'model_type': ['t5']}, r"model_type \['t5'\] is none of"),
  ],
)
def test_what_a_config_cannot_say_is_told(name, change, message, tmp_path):
  config = json.loads((GOLDEN / name / 'config.json').read_text()) | change
  with pytest.raises(ValueError, match=message):
    models.from_config(config)
  (tmp_path / 'config.json').write_text(json.dumps(config))
  with pytest.raises(ValueError, match=message):
    models.describe(tmp_path)


def test_colours_are_three(tmp_path):
  (tmp_path / 'config.json').write_text((GOLDEN / 'vit' / 'config.json').read_text())
  for told in ([0.5], [0.5, 0.5, 'x'], [1.0, 1.0, 0.0]):
    (tmp_path / 'preprocessor_config.json').write_text(json.dumps({'image_std': told}))
    with pytest.raises(ValueError, match='preprocessor_config.json: image_std'):
      models.describe(tmp_path)


def test_unknown_sources_name_the_nearest(tmp_path):
  with pytest.raises(ValueError, match="'dinov2-s16' is neither a folder.*dinov2-s14"):
    models.load('dinov2-s16')
  (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'robberta'}))
  with pytest.raises(ValueError, match="'robberta' is none of .*nearest is 'roberta'"):
    models.load(tmp_path)
  (tmp_path / 'config.json').write_text('{')
  with pytest.raises(ValueError, match='config.json is no JSON'):
    models.load(tmp_path)


@pytest.mark.parametrize(
  'kind,message',
  (
    ('deberta', "kin that loads is 'deberta-v2': deberta stores its projections fused"),
    ('gemma3', "kin that loads is 'gemma3_text': gemma3 reads images"),
    ('phimoe', "kin that loads is 'phi3': phimoe has experts"),
    ('swinv2', "kin that loads is 'swin'"),
    ('dinov3_convnext', "kin that loads is 'convnext': dinov3_convnext has a layout of its own"),
    ('data2vec-vision', "kin that loads is 'beit'"),
    ('videomae', "kin that loads is 'vit_mae': videomae reads videos"),
    ('wav2vec2', "kin that loads is 'bert': wav2vec2 reads sounds"),
    ('time_series_transformer', 'none of vit, [^;]*$'),
  ),
)
def test_an_unknown_kind_is_sent_to_its_kin(kind, message):
  with pytest.raises(ValueError, match=message):
    models.from_config({'model_type': kind})


def test_the_table_of_models_names_every_family_and_its_heads():
  page = (pathlib.Path(__file__).parents[2] / 'docs' / 'models.md').read_text()
  rows = [line for line in page.splitlines() if line.startswith('| ')]
  for kind, family in FAMILIES.items():
    (row,) = [row for row in rows if f'`{kind}`' in row]
    assert all(head in row for head in family.heads.known)


WELL_KNOWN = """
siglip2 chinese_clip swinv2 resnet dinov3_convnext vit_msn data2vec-vision ijepa videomae
mobilevit deberta xlnet albert longformer gemma3 phi
phimoe bloom falcon gpt_neox mamba deepseek_v3 bart mbart pegasus whisper wav2vec2
hubert
"""


@pytest.mark.parametrize('kind', WELL_KNOWN.split())
def test_well_known_families_that_do_not_load_have_kin(kind):
  with pytest.raises(ValueError) as error:
    models.from_config({'model_type': kind})
  near, difference = KIN[kind]
  assert str(error.value).endswith(
    f'its nearest kin that loads is {near!r}: {kind} {difference}'
  ) and '\n' not in str(error.value)


def test_kin_of_what_does_not_load_loads():
  assert not KIN.keys() & FAMILIES.keys()
  assert {near for near, _ in KIN.values()} <= FAMILIES.keys()


def test_inputs_of_another_size_are_refused():
  vit, bert = models.load(GOLDEN / 'vit'), models.load(GOLDEN / 'bert')
  with pytest.raises(ValueError, match='35x35 pixels do not fit a model made for 28x28'):
    vit.model.apply(vit.variables, jnp.zeros((1, 35, 35, 3)))
  with pytest.raises(ValueError, match='25 tokens are more than the 24 positions'):
    bert.model.apply(bert.variables, jnp.zeros((1, 25), jnp.int32))


def test_attention_fn_is_called_with_heads_apart():
  seen = []

  def attend(query, key, value, bias=None, mask=None, **_):
    seen.append((query.shape, key.shape, value.shape))
    return value

  x = jnp.ones((2, 5, 12))
  jax.eval_shape(Attention(heads=3, head_dim=2, attention_fn=attend).init, jax.random.key(0), x)
  assert seen == [((2, 5, 3, 2),) * 3]


@pytest.mark.parametrize('name', ('vit', 'bert', 't5'))
def test_a_block_can_be_cloned_narrower(name):
  kind = {'vit': models.PreNormBlock, 'bert': models.PostNormBlock, 't5': models.T5Block}[name]
  block = kind(heads=4, head_dim=8, mlp_dim=64).clone(head_dim=2, mlp_dim=8)
  x = jnp.ones((2, 5, 6))
  out, variables = jax.eval_shape(block.init_with_output, jax.random.key(0), x)
  assert out.shape == x.shape
  assert variables['params']['attention']['query']['kernel'].shape == (6, 8)
  assert variables['params']['mlp']['fc1']['kernel'].shape == (6, 8)
