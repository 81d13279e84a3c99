"""Keys of a config.json that the reader of its family does not know."""

import json
import warnings

import pytest

from jpeft import models
from jpeft.models.unread_keys import CHANGES, HARMLESS
from tests.models.goldens import GOLDEN

NAMES = sorted(file.parent.name for file in GOLDEN.glob('*/config.json'))


def config_of(name, **changes):
  return json.loads((GOLDEN / name / 'config.json').read_text()) | changes


@pytest.mark.parametrize('name', NAMES)
def test_what_transformers_writes_says_nothing(name):
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    models.from_config(config_of(name), head=None)


@pytest.mark.parametrize(
  ('name', 'key', 'value'),
  [
    ('llama', 'final_logit_softcapping', 30.0),
    ('qwen2', 'attn_logit_softcapping', 50.0),
    ('mistral', 'embedding_multiplier', 12.0),
    ('llama', 'no_rope_layers', [1, 0]),
    ('llama', 'partial_rotary_factor', 0.5),
    ('mistral', 'layer_types', ['full_attention', 'sliding_attention']),
    ('gpt2', 'rope_scaling', {'type': 'linear', 'factor': 2.0}),
    ('bert', 'alibi', True),
    ('bert', 'rotary_pct', 0.25),
    ('t5', 'logit_scale', 0.5),
    ('vit', 'use_qk_norm', True),
    ('clip', 'vision_config', {**config_of('clip')['vision_config'], 'scale_emb': 2.0}),
  ],
)
def test_a_key_that_changes_outputs_is_refused_by_name(name, key, value):
  said = 'scale_emb' if key == 'vision_config' else key
  with pytest.raises(ValueError, match=said):
    models.from_config(config_of(name, **{key: value}), head=None)


@pytest.mark.parametrize('value', [1, 1.0, None, False])
def test_a_value_that_changes_nothing_passes(value):
  models.from_config(config_of('llama', embedding_multiplier=value), head=None)


def test_an_encoder_that_is_a_decoder_is_refused():
  with pytest.raises(ValueError, match='is_decoder=True makes of this encoder a decoder'):
    models.from_config(config_of('bert', is_decoder=True), head=None)


def test_a_key_that_nobody_knows_is_told():
  with pytest.warns(
    UserWarning, match="llama model has new_attention='wide', which jpeft does not"
  ):
    models.from_config(config_of('llama', new_attention='wide', another=None), head=None)
  assert not HARMLESS & CHANGES.keys()
