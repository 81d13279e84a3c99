"""BERT, RoBERTa and MiniLM as Hugging Face stores them."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ..families import Family, Request, depth_of, shape_of, with_labels
from ..io import Checkpoint, Table, read_json
from ..nn import activation
from .model import Bert

_ROWS = (
  ('embed/word', 'embed', 'embeddings.word_embeddings'),
  ('embed/position', 'embed', 'embeddings.position_embeddings'),
  ('embed/type', 'embed', 'embeddings.token_type_embeddings'),
  ('embed/norm', 'norm', 'embeddings.LayerNorm'),
  ('encoder/block/attention/query', 'dense', 'encoder.layer.{i}.attention.self.query'),
  ('encoder/block/attention/key', 'dense', 'encoder.layer.{i}.attention.self.key'),
  ('encoder/block/attention/value', 'dense', 'encoder.layer.{i}.attention.self.value'),
  ('encoder/block/attention/out', 'dense', 'encoder.layer.{i}.attention.output.dense'),
  ('encoder/block/norm1', 'norm', 'encoder.layer.{i}.attention.output.LayerNorm'),
  ('encoder/block/mlp/fc1', 'dense', 'encoder.layer.{i}.intermediate.dense'),
  ('encoder/block/mlp/fc2', 'dense', 'encoder.layer.{i}.output.dense'),
  ('encoder/block/norm2', 'norm', 'encoder.layer.{i}.output.LayerNorm'),
)
_POOLER = (('pooler', 'dense', 'pooler.dense'),)
# Buffers, and heads that the model does without.
_IGNORE = (
  r'embeddings\.(position|token_type)_ids',
  r'pooler\..*',
  r'classifier\..*',
  r'cls\..*',
  r'lm_head\..*',
)

BERT = Table(
  base='bert.',
  rows=_ROWS + _POOLER,
  head=(('head', 'dense', 'classifier'),),
  ignore=_IGNORE,
  architectures=('BertModel', 'BertForSequenceClassification'),
)
ROBERTA = BERT._replace(
  base='roberta.', head=(), architectures=('RobertaModel', 'RobertaForSequenceClassification')
)
# The classifier of RoBERTa is a pooler and a head under other names.
ROBERTA_CLASSIFIER = ROBERTA._replace(
  rows=_ROWS,
  head=(('pooler', 'dense', 'classifier.dense'), ('head', 'dense', 'classifier.out_proj')),
)


def _pool(config: Mapping, checkpoint: Checkpoint | None) -> str:
  """The pooling in the config, else that of the sentence encoder, else 'cls'."""
  if 'jpeft_pool' in config:
    return config['jpeft_pool']
  if checkpoint is None:
    return 'cls'
  file = checkpoint.folder / '1_Pooling' / 'config.json'  # of sentence encoders
  if file.exists() and read_json(file).get('pooling_mode_mean_tokens'):
    return 'mean'
  return 'cls'


def _build(config: Mapping, checkpoint: Checkpoint | None, request: Request) -> Bert:
  roberta = config['model_type'] == 'roberta'
  if config.get('position_embedding_type', 'absolute') != 'absolute':
    raise ValueError(
      f'position_embedding_type {config["position_embedding_type"]!r} is not '
      "supported, only 'absolute'"
    )
  head_key = 'classifier.weight'
  pad_id = None
  if roberta:
    head_key = 'classifier.out_proj.weight'
    pad_id = config.get('pad_token_id', 1)
  pool = request.pool or _pool(config, checkpoint)
  classes = request.num_classes
  head = shape_of(checkpoint, head_key)
  if classes is None and head and pool != 'tokens':
    classes = head[0]
  return Bert(
    config['hidden_size'],
    depth_of(config, 'num_hidden_layers', request),
    config['num_attention_heads'],
    config['intermediate_size'],
    config['vocab_size'],
    config['max_position_embeddings'],
    config.get('type_vocab_size', 2),
    pad_id=pad_id,
    num_classes=classes,
    pool=pool,
    pooler=pool == 'cls' and _has_pooler(checkpoint, roberta, classes),
    eps=config.get('layer_norm_eps', 1e-12),
    activation=activation(config.get('hidden_act', 'gelu')),
    dropout=config.get('hidden_dropout_prob', 0.1),
    attention_dropout=config.get('attention_probs_dropout_prob', 0.1),
    **request.fields,
  )


def _has_pooler(checkpoint: Checkpoint | None, roberta: bool, classes: int | None) -> bool:
  """Whether a head that reads the first token comes after a pooler."""
  if roberta and classes is not None:
    return True
  stored = [shape_of(checkpoint, f'{key}.dense.weight') for key in ('pooler', 'classifier')]
  return any(stored)


def _table(model: Bert) -> Table:
  if model.pad_id is None:
    return BERT
  if model.num_classes is None:
    return ROBERTA
  return ROBERTA_CLASSIFIER


def _describe(config: Mapping, model: Bert) -> dict:
  return with_labels(config, model.num_classes) | {
    'num_hidden_layers': model.depth,
    'jpeft_pool': model.pool,  # our own key, which transformers ignores
  }


def example(model: Bert) -> tuple:
  """Abstract inputs of one call."""
  return (jax.ShapeDtypeStruct((1, 8), jnp.int32),)


_SIZES = {'heads': 'num_attention_heads', 'mlp_dim': 'intermediate_size'}
_FAMILY = Family(_build, _table, example, _describe, sizes=_SIZES)
BERT_FAMILIES = {'bert': _FAMILY, 'roberta': _FAMILY}
