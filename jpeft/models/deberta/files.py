"""DeBERTa-v3 as Hugging Face stores it, under the name of DeBERTa-v2."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ..families import Family, Request, depth_of, shape_of, with_labels
from ..heads import Heads
from ..io import Checkpoint, Table
from ..nn import activation
from .model import Deberta, Distances

_BLOCK = 'encoder.layer.{i}.'
_ROWS = (
  ('embed/word', 'embed', 'embeddings.word_embeddings'),
  ('embed/norm', 'norm', 'embeddings.LayerNorm'),
  ('encoder/distances', 'embed', 'encoder.rel_embeddings'),
  ('encoder/distance_norm', 'norm', 'encoder.LayerNorm'),
  ('encoder/block/attention/query', 'dense', f'{_BLOCK}attention.self.query_proj'),
  ('encoder/block/attention/key', 'dense', f'{_BLOCK}attention.self.key_proj'),
  ('encoder/block/attention/value', 'dense', f'{_BLOCK}attention.self.value_proj'),
  ('encoder/block/attention/out', 'dense', f'{_BLOCK}attention.output.dense'),
  ('encoder/block/norm1', 'norm', f'{_BLOCK}attention.output.LayerNorm'),
  ('encoder/block/mlp/fc1', 'dense', f'{_BLOCK}intermediate.dense'),
  ('encoder/block/mlp/fc2', 'dense', f'{_BLOCK}output.dense'),
  ('encoder/block/norm2', 'norm', f'{_BLOCK}output.LayerNorm'),
)
# Of each head: its key, and what follows the family's name in its class.
_PURPOSES = {
  'classification': ('pooler.dense', 'ForSequenceClassification'),
  'tokens': ('classifier', 'ForTokenClassification'),
  'questions': ('qa_outputs', 'ForQuestionAnswering'),
}
# Heads that jpeft does not have: of masked and of replaced words.
_OTHERS = (r'(lm_predictions|mask_predictions|cls)\..*',)
_HEADS = Heads({head: rf'{key}\.weight' for head, (key, _) in _PURPOSES.items()}, _OTHERS)
_IGNORE = (
  r'embeddings\.position_ids',
  r'(pooler|classifier|qa_outputs)\..*',
  *_OTHERS,
)
# What is built, by the keys of the config; a config that lacks one has transformers' default, which
# is that of older models.
_BUILT = {
  'relative_attention': (False, True),
  'position_biased_input': (True, False),
  'share_att_key': (False, True),
  'norm_rel_ebd': ('none', 'layer_norm'),
  'type_vocab_size': (0, 0),
  'conv_kernel_size': (0, 0),
}


def _table(model: Deberta) -> Table:
  name = model.head
  if name is None and model.num_classes is not None:
    name = 'classification'
  head: tuple[tuple[str, str, str], ...] = ()
  if name == 'classification':
    head = (('pooler', 'dense', 'pooler.dense'), ('head', 'dense', 'classifier'))
  elif name is not None:
    head = (('head', 'dense', _PURPOSES[name][0]),)
  purpose = _PURPOSES[name or 'classification'][1]
  architectures = ('DebertaV2Model', f'DebertaV2{purpose}')
  return Table('deberta.', _ROWS, head, _IGNORE, architectures)


def _build(config: Mapping, checkpoint: Checkpoint | None, request: Request) -> Deberta:
  if request.head in ('tokens', 'questions') and request.pool is not None:
    raise ValueError(
      f'head {request.head!r} reads every token: it takes no pool, got {request.pool!r}'
    )
  _check_built(config)
  classes = None
  if request.head in ('classification', 'tokens'):
    shape = shape_of(checkpoint, 'classifier.weight')
    classes = request.num_classes or (shape[0] if shape else None)
  furthest = config.get('max_relative_positions', -1)
  positions = config.get('max_position_embeddings', 512)
  return Deberta(
    config['hidden_size'],
    depth_of(config, 'num_hidden_layers', request),
    config['num_attention_heads'],
    config['intermediate_size'],
    config['vocab_size'],
    positions,
    Distances(config['position_buckets'], furthest if furthest >= 1 else positions),
    num_classes=classes,
    head=request.head,
    pool=request.pool or config.get('jpeft_pool', 'cls'),
    pooler_activation=activation(config.get('pooler_hidden_act', 'gelu')),
    eps=config.get('layer_norm_eps', 1e-7),
    activation=activation(config.get('hidden_act', 'gelu')),
    dropout=config.get('hidden_dropout_prob', 0.1),
    attention_dropout=config.get('attention_probs_dropout_prob', 0.1),
    **request.fields,
  )


def _check_built(config: Mapping) -> None:
  """Raises a ValueError for what a DeBERTa-v2 may have and a v3 has not."""
  for key, (default, built) in _BUILT.items():
    found = config.get(key, default)
    if found != built:
      raise ValueError(
        f'{key}={found!r} is not supported, only {built!r}: of this family jpeft has DeBERTa-v3'
      )
  kinds = config.get('pos_att_type') or ''
  if isinstance(kinds, str):
    kinds = kinds.lower().split('|')
  if sorted(kinds) != ['c2p', 'p2c']:
    raise ValueError(f"pos_att_type={kinds!r} is not supported, only ['p2c', 'c2p']")
  if config.get('position_buckets', -1) < 4:
    raise ValueError('position_buckets must be at least 4: distances without buckets are not read')
  width = config['hidden_size']
  for key in ('embedding_size', 'pooler_hidden_size'):
    if config.get(key, width) != width:
      raise ValueError(f'{key}={config[key]} is not supported, only hidden_size={width}')
  heads = config['num_attention_heads']
  if config.get('attention_head_size', width // heads) != width // heads:
    raise ValueError(
      f'attention_head_size={config["attention_head_size"]} is not supported, only '
      f'hidden_size / num_attention_heads'
    )


def _describe(config: Mapping, model: Deberta) -> dict:
  classes = 2 if model.head == 'questions' else model.num_classes
  return with_labels(config, classes) | {
    'num_hidden_layers': model.depth,
    'jpeft_pool': model.pool,  # our own key, which transformers ignores
  }


def example(model: Deberta) -> tuple:
  """Abstract inputs of one call."""
  return (jax.ShapeDtypeStruct((1, 8), jnp.int32),)


DEBERTA_FAMILIES = {'deberta-v2': Family(_build, _table, example, _describe, heads=_HEADS)}
