"""ModernBERT as Hugging Face stores it."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ..families import Family, Request, depth_of, shape_of, with_labels
from ..heads import Heads
from ..io import Checkpoint, Table
from ..llama.files import rope_of
from ..nn import Rope, activation
from .model import ModernBert

_BLOCK = 'layers.{i}.'
# Rows of one key are parts of one tensor, in this order.
_ROWS = (
  ('embed/word', 'embed', 'embeddings.tok_embeddings'),
  ('embed/norm', 'norm', 'embeddings.norm'),
  ('encoder/block/norm1', 'norm', f'{_BLOCK}attn_norm'),
  ('encoder/block/attention/query', 'dense', f'{_BLOCK}attn.Wqkv'),
  ('encoder/block/attention/key', 'dense', f'{_BLOCK}attn.Wqkv'),
  ('encoder/block/attention/value', 'dense', f'{_BLOCK}attn.Wqkv'),
  ('encoder/block/attention/out', 'dense', f'{_BLOCK}attn.Wo'),
  ('encoder/block/norm2', 'norm', f'{_BLOCK}mlp_norm'),
  ('encoder/block/mlp/gate', 'dense', f'{_BLOCK}mlp.Wi'),
  ('encoder/block/mlp/fc1', 'dense', f'{_BLOCK}mlp.Wi'),
  ('encoder/block/mlp/fc2', 'dense', f'{_BLOCK}mlp.Wo'),
  ('final_norm', 'norm', 'final_norm'),
)
_INNER = (('head_dense', 'dense', 'head.dense'), ('head_norm', 'norm', 'head.norm'))
_DECODER, _WORDS = 'decoder.weight', 'embeddings.tok_embeddings.weight'
_PURPOSES = {
  'classification': 'ForSequenceClassification',
  'tokens': 'ForTokenClassification',
  'questions': 'ForQuestionAnswering',
  'masked': 'ForMaskedLM',
}
# The heads with labels have one key, and are told apart by the class in the config.
_LABELS = r'classifier\.weight'
_HEADS = Heads({**dict.fromkeys(_PURPOSES, _LABELS), 'masked': r'decoder\.(weight|bias)'})
_IGNORE = (r'head\..*', r'classifier\..*', r'decoder\..*')
# Of blocks of each type, where a config has none: the rotary positions, and the key of older ones.
_THETAS = {
  'full_attention': (160000.0, 'global_rope_theta'),
  'sliding_attention': (10000.0, 'local_rope_theta'),
}


def _table(model: ModernBert) -> Table:
  name = model.head
  if name is None and model.num_classes is not None:
    name = 'classification'
  head: tuple[tuple[str, str, str], ...] = ()
  if name == 'masked':
    head = (*_INNER, ('head/bias', 'param', 'decoder.bias'))
  elif name is not None:
    head = (*_INNER, ('head', 'dense', 'classifier'))
  architectures = ('ModernBertModel', 'ModernBert' + _PURPOSES[name or 'masked'])
  return Table('model.', _ROWS, head, _IGNORE, architectures, fresh=('head_dense', 'head_norm'))


def _build(config: Mapping, checkpoint: Checkpoint | None, request: Request) -> ModernBert:
  if request.head in ('tokens', 'questions', 'masked') and request.pool is not None:
    raise ValueError(
      f'head {request.head!r} reads every token: it takes no pool, got {request.pool!r}'
    )
  if request.head == 'masked':
    _check_masked(config, checkpoint)
  classes = None
  if request.head in ('classification', 'tokens'):
    shape = shape_of(checkpoint, 'classifier.weight')
    classes = request.num_classes or (shape[0] if shape else None)
  depth = depth_of(config, 'num_hidden_layers', request)
  return ModernBert(
    config['hidden_size'],
    depth,
    config['num_attention_heads'],
    config['intermediate_size'],
    config['vocab_size'],
    config.get('max_position_embeddings', 8192),
    window=_windows(config, depth),
    rope=_rope(config, 'full_attention'),
    window_rope=_rope(config, 'sliding_attention'),
    attention_bias=config.get('attention_bias', False),
    mlp_bias=config.get('mlp_bias', False),
    norm_bias=config.get('norm_bias', False),
    head_bias=config.get('classifier_bias', False),
    head_activation=activation(config.get('classifier_activation', 'gelu')),
    num_classes=classes,
    head=request.head,
    pool=request.pool or config.get('jpeft_pool') or config.get('classifier_pooling', 'cls'),
    eps=config.get('norm_eps', 1e-5),
    activation=activation(config.get('hidden_activation') or 'gelu'),
    dropout=config.get('mlp_dropout', 0.0),
    embed_dropout=config.get('embedding_dropout', 0.0),
    head_dropout=config.get('classifier_dropout') or 0.0,
    attention_dropout=config.get('attention_dropout', 0.0),
    **request.fields,
  )


def _check_masked(config: Mapping, checkpoint: Checkpoint | None) -> None:
  """Raises a ValueError for a head of masked words that has a table of its own, or no bias."""
  own = not config.get('tie_word_embeddings', True)
  if checkpoint is not None and {_DECODER, f'model.{_WORDS}'} <= set(checkpoint.shapes):
    words = checkpoint.read(f'model.{_WORDS}')
    own = not np.array_equal(checkpoint.read(_DECODER), words)
  if own:
    raise ValueError(
      f"head 'masked' reads the word table, and this one has a table of its own, {_DECODER!r}: "
      'head=None loads the model without it'
    )
  if not config.get('decoder_bias', True):
    raise ValueError(
      "decoder_bias=False is not supported, only a head 'masked' with a bias: head=None loads the "
      'model without it'
    )


def _windows(config: Mapping, depth: int) -> int | None | tuple[int | None, ...]:
  """The window of each block; one value if they are alike."""
  types = config.get('layer_types')
  if types is None:
    every = config.get('global_attn_every_n_layers', 3)
    types = ['sliding_attention' if i % every else 'full_attention' for i in range(depth)]
  # Half of local_attention before a token, and half behind.
  near = config.get('local_attention', 128) // 2 + 1
  windows = tuple(near if name == 'sliding_attention' else None for name in types[:depth])
  return windows if len(set(windows)) > 1 else windows[0]


def _rope(config: Mapping, layer_type: str) -> Rope:
  theta, key = _THETAS[layer_type]
  own = (config.get('rope_parameters') or {}).get(layer_type)
  if own is not None:
    return rope_of({'rope_parameters': {'rope_theta': theta, **own}})
  older = config.get(key)
  if older is None:
    older = config.get('global_rope_theta', theta) if key in config else theta
  return rope_of({'rope_theta': older, 'rope_scaling': config.get('rope_scaling')})


def _describe(config: Mapping, model: ModernBert) -> dict:
  classes = 2 if model.head == 'questions' else model.num_classes
  config = with_labels(config, classes) | {
    'num_hidden_layers': model.depth,
    'jpeft_pool': model.pool,  # our own key, which transformers ignores
  }
  if model.pool != 'tokens':
    config['classifier_pooling'] = model.pool
  if config.get('layer_types'):
    config['layer_types'] = config['layer_types'][: model.depth]
  return config


def example(model: ModernBert) -> tuple:
  """Abstract inputs of one call."""
  return (jax.ShapeDtypeStruct((1, 8), jnp.int32),)


MODERNBERT_FAMILIES = {
  'modernbert': Family(
    _build,
    _table,
    example,
    _describe,
    sizes={'heads': 'num_attention_heads', 'mlp_dim': 'intermediate_size'},
    heads=_HEADS,
  )
}
