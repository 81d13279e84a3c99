"""T5, T5 v1.1, Flan-T5 and mT5 as Hugging Face stores them."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ..families import Family, Request, depth_of, shape_of, with_labels
from ..heads import Heads
from ..io import Checkpoint, Table
from ..nn import activation
from .model import T5

_ATTENTION = (('query', 'q'), ('key', 'k'), ('value', 'v'), ('out', 'o'))


def _stack(ours: str, cross: bool) -> tuple[tuple[str, str, str], ...]:
  """The rows of the encoder or the decoder, without those of the MLP's first layers.

  On disk the sublayers of a block are numbered: self-attention, cross-attention if any, MLP.
  """
  block = f'{ours}/block'
  layer = f'{ours}.block.{{i}}.layer.'
  mlp = 2 if cross else 1
  # The first block's self-attention has the bias that all blocks share.
  bias = f'{ours}.block.0.layer.0.SelfAttention.relative_attention_bias'
  rows = [
    (f'{block}/norm1', 'norm', f'{layer}0.layer_norm'),
    (f'{block}/norm2', 'norm', f'{layer}{mlp}.layer_norm'),
    (f'{block}/mlp/fc2', 'dense', f'{layer}{mlp}.DenseReluDense.wo'),
    (f'{ours}/final_norm', 'norm', f'{ours}.final_layer_norm'),
    (f'{ours}/position_bias', 'embed', bias),
  ]
  for our, their in _ATTENTION:
    rows.append((f'{block}/attention/{our}', 'dense', f'{layer}0.SelfAttention.{their}'))
  if cross:
    rows.append((f'{block}/norm_cross', 'norm', f'{layer}1.layer_norm'))
    for our, their in _ATTENTION:
      rows.append((f'{block}/cross_attention/{our}', 'dense', f'{layer}1.EncDecAttention.{their}'))
  return tuple(rows)


def _mlp(gated: bool) -> tuple[tuple[str, str, str], ...]:
  """The rows of the MLPs' first layers."""
  names = {'fc1': 'wi'}
  if gated:
    names = {'gate': 'wi_0', 'fc1': 'wi_1'}
  rows = []
  for stack, mlp in (('encoder', 1), ('decoder', 2)):
    for our, their in names.items():
      key = f'{stack}.block.{{i}}.layer.{mlp}.DenseReluDense.{their}'
      rows.append((f'{stack}/block/mlp/{our}', 'dense', key))
  return tuple(rows)


_SHARED_ROWS = (
  ('embed', 'embed', 'shared'),
  *_stack('encoder', cross=False),
  *_stack('decoder', cross=True),
)
# Copies of the word table, a table that the first releases stored without using it, and what the
# encoder alone does without: whether it is alone is decided before.
_IGNORE = (
  r'(encoder|decoder)\.embed_tokens\.weight',
  r'lm_head\.weight',
  r'decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight',
)
_IGNORE_DECODER = (*_IGNORE, r'decoder\..*', r'classifier\..*')
_NAMES = {'t5': 'T5', 'mt5': 'MT5'}
_HEADS = Heads(
  {'text': r'decoder\.final_layer_norm\.weight', 'tokens': r'classifier\.weight'},
  others=(r'classification_head\..*', r'qa_outputs\..*'),
  default='text',
)


def _table(kind: str, model: T5) -> Table:
  rows = (*_SHARED_ROWS, *_mlp(model.gated))
  name = _NAMES[kind]
  if model.head == 'text':
    # Without a head of its own it is the same class, whose head is the word table.
    both = f'{name}ForConditionalGeneration'
    return Table('', rows, (('head', 'dense', 'lm_head'),), _IGNORE, (both, both))
  encoder = f'{name}EncoderModel'
  if model.head is None:
    return Table('', rows, (), _IGNORE_DECODER, (encoder, encoder), other_bases=('transformer.',))
  head = (('head', 'dense', 'classifier'),)
  return Table(
    'transformer.', rows, head, _IGNORE_DECODER, (encoder, f'{name}ForTokenClassification')
  )


def _build(config: Mapping, checkpoint: Checkpoint | None, request: Request) -> T5:
  if request.head is not None and request.pool is not None:
    raise ValueError(
      f'head {request.head!r} of a T5 reads every token: it takes no pool, got {request.pool!r}'
    )
  classes = request.num_classes
  if request.head == 'tokens' and classes is None:
    shape = shape_of(checkpoint, 'classifier.weight')
    classes = shape[0] if shape else None
  name = config.get('feed_forward_proj', 'relu')
  gated = name.startswith('gated-')
  name = name.removeprefix('gated-')
  if gated and name == 'gelu':
    # Released v1.1 weights were trained with the tanh form, although their config says gelu.
    name = 'gelu_new'
  depth = depth_of(config, 'num_layers', request)
  decoder_depth = config.get('num_decoder_layers') or config['num_layers']
  if request.layers is not None:
    decoder_depth = min(decoder_depth, request.layers)
  # Only models that were trained tied scale their output; a file may since have got its own head.
  tied = config.get('tie_word_embeddings', True)
  scale_output = config.get('scale_decoder_outputs', tied)
  if config['model_type'] == 'mt5':
    scale_output = False  # none was trained tied, whatever configs say since
  if checkpoint is not None and request.head == 'text':
    tied = _tied(checkpoint)
  return T5(
    config['d_model'],
    depth,
    config['num_heads'],
    config['d_ff'],
    config['vocab_size'],
    head_dim=config['d_kv'],
    decoder_depth=decoder_depth,
    gated=gated,
    tied=tied,
    num_classes=classes,
    head=request.head,
    pool=request.pool or config.get('jpeft_pool', 'tokens'),
    scale_output=scale_output,
    buckets=config.get('relative_attention_num_buckets', 32),
    max_distance=config.get('relative_attention_max_distance', 128),
    eps=config.get('layer_norm_epsilon', 1e-6),
    activation=activation(name),
    dropout=config.get('dropout_rate', 0.1),
    attention_dropout=config.get('dropout_rate', 0.1),
    **request.fields,
  )


def _tied(checkpoint: Checkpoint) -> bool:
  """Whether the files have no head of their own; a copy of the word table is none."""
  if 'lm_head.weight' not in checkpoint.shapes:
    return True
  if 'shared.weight' not in checkpoint.shapes:
    return False
  return np.array_equal(checkpoint.read('lm_head.weight'), checkpoint.read('shared.weight'))


def _describe(config: Mapping, model: T5) -> dict:
  config = with_labels(config, model.num_classes)
  if model.head != 'text':
    # The decoder that it was made without may come back, so that the config keeps its sizes.
    return config | {
      'num_layers': model.depth,
      'jpeft_pool': model.pool,  # our own key, which transformers ignores
    }
  return config | {
    'num_layers': model.depth,
    'num_decoder_layers': model.decoder_depth,
    'tie_word_embeddings': model.tied,
    'scale_decoder_outputs': model.scale_output,
  }


def example(model: T5) -> tuple:
  """Abstract inputs of one call."""
  tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  if model.head == 'text':
    return tokens, tokens
  return (tokens,)


def _family(kind: str) -> Family:
  return Family(
    _build,
    functools.partial(_table, kind),
    example,
    _describe,
    sizes={'heads': 'num_heads', 'mlp_dim': 'd_ff'},
    heads=_HEADS,
  )


T5_FAMILIES = {kind: _family(kind) for kind in _NAMES}
