"""A backbone and data so small that a whole run takes a few seconds."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from jpeft import config, models

VIT = {
  'model_type': 'vit',
  'hidden_size': 16,
  'num_hidden_layers': 2,
  'num_attention_heads': 2,
  'intermediate_size': 32,
  'image_size': 8,
  'patch_size': 4,
  'num_channels': 3,
  'hidden_act': 'gelu',
  'layer_norm_eps': 1e-6,
  'hidden_dropout_prob': 0.1,
  'attention_probs_dropout_prob': 0.0,
  'qkv_bias': True,
}


@pytest.fixture(scope='session')
def backbone(tmp_path_factory) -> pathlib.Path:
  """A folder with a random ViT in the layout of Hugging Face."""
  folder = tmp_path_factory.mktemp('backbone')
  model = models.from_config(VIT)
  variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))
  models.save_pretrained(folder, model, variables, VIT)
  return folder


@pytest.fixture(scope='session')
def compilations(tmp_path_factory) -> pathlib.Path:
  """Where runs that are killed keep what they compile: for one session, as files may be broken."""
  return tmp_path_factory.mktemp('compilations')


@pytest.fixture(scope='session')
def images(tmp_path_factory) -> pathlib.Path:
  """Two classes of 8x8 images, one reddish and one bluish: 24 to train on, 10 to test."""
  root, rng = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
  for split, count in (('train', 12), ('test', 5)):
    for channel, label in ((0, 'red'), (2, 'blue')):
      (root / split / label).mkdir(parents=True)
      for i in range(count):
        pixels = rng.integers(0, 200, (8, 8, 3), dtype=np.uint8)
        pixels[..., channel] += 55
        Image.fromarray(pixels).save(root / split / label / f'{i}.png')
  return root


CONFIG = '''"""A run of seconds."""


def get_config(method='linear'):
  return {{
    'model': {{'source': {backbone!r}}},
    'data': {{'name': 'folder:{images}', 'batch_size': 4}},
    'method': {{'name': method}},
    'optimizer': {{'lr': 1e-2}},
    'steps': 12,
    'eval': {{'every': 6}},
    'checkpoint': {{'every': 3}},
    'log': {{'every': 2}},
  }}
'''


@pytest.fixture(scope='session')
def config_file(backbone, images, tmp_path_factory) -> pathlib.Path:
  path = tmp_path_factory.mktemp('configs') / 'tiny.py'
  path.write_text(CONFIG.format(backbone=str(backbone), images=images))
  return path


@pytest.fixture
def load(config_file):
  """load(method, **{dotted key: text}) -> a checked config."""
  from jpeft import config

  def loaded(method='linear', **overrides):
    return config.load(f'{config_file}:{method}', {k: str(v) for k, v in overrides.items()})

  return loaded


LLAMA = {
  'model_type': 'llama',
  'hidden_size': 32,
  'num_hidden_layers': 1,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'intermediate_size': 64,
  'vocab_size': 24,
  'max_position_embeddings': 128,
  'rms_norm_eps': 1e-5,
  'hidden_act': 'silu',
  'tie_word_embeddings': True,
}
WORDS = ['<|end|>', '<|user|>', '<|assistant|>', '[UNK]', *'abcdefghij', *'ABCDEFGHIJ']
TEMPLATE = (
  "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} {{ eos_token }} {% endfor %}"
  '{% if add_generation_prompt %}<|assistant|> {% endif %}'
)


@pytest.fixture(scope='session')
def decoder(tmp_path_factory) -> pathlib.Path:
  """A folder with a random decoder and its tokenizer, which knows words and a chat template."""
  from tokenizers import Tokenizer, pre_tokenizers
  from tokenizers import models as parts

  folder = tmp_path_factory.mktemp('decoder')
  model = models.from_config(LLAMA)
  models.save_pretrained(
    folder, model, jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32)), LLAMA
  )
  tokenizer = Tokenizer(
    parts.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token='[UNK]')
  )
  tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  tokenizer.add_special_tokens(WORDS[:3])
  tokenizer.save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text(
    json.dumps({'eos_token': '<|end|>', 'chat_template': TEMPLATE})
  )
  return folder


@pytest.fixture(scope='session')
def wide_decoder(decoder, tmp_path_factory) -> pathlib.Path:
  """The same with words as wide as those of trained models: a side network is read by this frozen
  head.
  """
  folder = tmp_path_factory.mktemp('wide') / 'decoder'
  shutil.copytree(decoder, folder)
  held = models.load(decoder)
  held.variables['params']['embed']['embedding'] *= 5
  models.save_pretrained(folder, held.model, held.variables, LLAMA)
  return folder


@pytest.fixture(scope='session')
def backwards(tmp_path_factory) -> pathlib.Path:
  """A file of all prompts 'x y j' of two letters, whose completions are 'Y X'."""
  path = tmp_path_factory.mktemp('backwards') / 'backwards.jsonl'
  path.write_text(
    ''.join(
      json.dumps({'prompt': f'{x} {y} j', 'completion': f'{y} {x}'.upper()}) + '\n'
      for x in 'abcdefghi'
      for y in 'abcdefghi'
    )
  )
  return path


@pytest.fixture(scope='session')
def language(decoder, backwards):
  """language(**{dotted key: value}) -> a checked config that learns to write `backwards`."""

  def made(**overrides):
    values = {
      'task': 'language',
      'model.source': str(decoder),
      'data.name': f'completions:{backwards}',
      'data.batch_size': 8,
      'data.max_length': 24,
      **overrides,
    }
    return config.complete(config.nest(values))

  return made


BERT = {
  'model_type': 'bert',
  'hidden_size': 16,
  'num_hidden_layers': 2,
  'num_attention_heads': 2,
  'intermediate_size': 32,
  'vocab_size': 40,
  'max_position_embeddings': 32,
  'type_vocab_size': 2,
  'layer_norm_eps': 1e-12,
  'hidden_act': 'gelu',
  'hidden_dropout_prob': 0.0,
  'attention_probs_dropout_prob': 0.0,
  'initializer_range': 0.02,
  'pad_token_id': 0,
}
SPECIAL = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']
PIECES = [*SPECIAL, 'in', 'sees', 'jan', '##e', 'bob', 'ro', '##me', 'oslo', '?', *'abcdefghijklm']


@pytest.fixture(scope='session')
def encoder(tmp_path_factory) -> pathlib.Path:
  """A folder with a random BERT with a head of masked words, and its tokenizer: words of PIECES."""
  from tokenizers import Tokenizer, pre_tokenizers, processors
  from tokenizers import models as parts

  folder = tmp_path_factory.mktemp('encoder')
  model = models.from_config(BERT, head='masked')
  variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32))
  variables['params']['embed']['word']['embedding'] *= 10  # of a size that a trained model has
  models.save_pretrained(folder, model, variables, BERT)
  ids = {piece: i for i, piece in enumerate(PIECES)}
  tokenizer = Tokenizer(parts.WordPiece(ids, unk_token='[UNK]'))
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  tokenizer.add_special_tokens(SPECIAL)
  tokenizer.post_processor = processors.TemplateProcessing(
    single='[CLS] $A [SEP]',
    pair='[CLS] $A [SEP] $B:1 [SEP]:1',
    special_tokens=[('[CLS]', 2), ('[SEP]', 3)],
  )
  tokenizer.save(str(folder / 'tokenizer.json'))
  return folder


@pytest.fixture(scope='session')
def inside(encoder):
  """inside(task, data name, **{dotted key: value}) -> a checked config of a task inside texts."""

  def made(task, name, **overrides):
    values = {
      'task': task,
      'model.source': str(encoder),
      'data.name': name,
      'data.batch_size': 8,
      'data.max_length': 16,
      'method.name': 'full',
      'optimizer.lr': 1e-2,
      'steps': 60,
      'eval.every': 30,
      'log.every': 10,
      **overrides,
    }
    return config.complete(config.nest(values))

  return made
