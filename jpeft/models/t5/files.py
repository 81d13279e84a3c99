"""T5, T5 v1.1 and Flan-T5 as Hugging Face stores them."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ..families import Family, Request, depth_of
from ..io.layout import Table
from ..io.safetensors import Checkpoint
from ..nn.layers import activation
from .model import T5

_ATTENTION = (('query', 'q'), ('key', 'k'), ('value', 'v'), ('out', 'o'))


def _stack(ours: str, cross: bool) -> tuple[tuple[str, str, str], ...]:
  """The rows of the encoder or the decoder: sublayers are numbered on disk."""
  block, layer = f'{ours}/block', ours + '.block.{i}.layer.'
  last = '2' if cross else '1'
  rows = [
    (f'{block}/norm1', 'norm', f'{layer}0.layer_norm'),
    (f'{block}/norm2', 'norm', f'{layer}{last}.layer_norm'),
    (f'{block}/mlp/fc2', 'dense', f'{layer}{last}.DenseReluDense.wo'),
    (f'{ours}/final_norm', 'norm', f'{ours}.final_layer_norm'),
    (
      f'{ours}/position_bias',
      'embed',
      f'{ours}.block.0.layer.0.SelfAttention.relative_attention_bias',
    ),
  ]
  rows += [
    (f'{block}/attention/{our}', 'dense', f'{layer}0.SelfAttention.{their}')
    for our, their in _ATTENTION
  ]
  if cross:
    rows += [(f'{block}/norm_cross', 'norm', f'{layer}1.layer_norm')]
    rows += [
      (f'{block}/cross_attention/{our}', 'dense', f'{layer}1.EncDecAttention.{their}')
      for our, their in _ATTENTION
    ]
  return tuple(rows)


def _mlp(gated: bool) -> tuple[tuple[str, str, str], ...]:
  names = (('gate', 'wi_0'), ('fc1', 'wi_1')) if gated else (('fc1', 'wi'),)
  return tuple(
    (
      f'{stack}/block/mlp/{our}',
      'dense',
      stack + '.block.{i}.layer.' + f'{number}.DenseReluDense.{their}',
    )
    for stack, number in (('encoder', 1), ('decoder', 2))
    for our, their in names
  )


T5_V1 = Table(
  '',
  (
    ('embed', 'embed', 'shared'),
    *_stack('encoder', cross=False),
    *_stack('decoder', cross=True),
    *_mlp(gated=False),
  ),
  (('head', 'dense', 'lm_head'),),
  (
    r'(encoder|decoder)\.embed_tokens\.weight',
    r'lm_head\.weight',
    r'decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight',
  ),
  ('T5ForConditionalGeneration', 'T5ForConditionalGeneration'),
)
T5_GATED = T5_V1._replace(
  rows=(
    T5_V1.rows[0],
    *_stack('encoder', cross=False),
    *_stack('decoder', cross=True),
    *_mlp(gated=True),
  )
)


def _build(config: Mapping, checkpoint: Checkpoint | None, request: Request) -> T5:
  if request.num_classes is not None or request.pool is not None:
    raise ValueError('T5 writes text: it takes neither num_classes nor pool')
  act = config.get('feed_forward_proj', 'relu')
  gated = act.startswith('gated-')
  # Released v1.1 weights were trained with the tanh form, although their config says gelu.
  act = 'gelu_new' if act == 'gated-gelu' else act.removeprefix('gated-')
  tie = config.get('tie_word_embeddings', True)
  depth = depth_of(config, 'num_layers', request)
  decoder = config.get('num_decoder_layers') or config['num_layers']
  return T5(
    config['d_model'],
    depth,
    config['num_heads'],
    config['d_ff'],
    config['vocab_size'],
    head_dim=config['d_kv'],
    decoder_depth=min(decoder, request.layers or decoder),
    gated=gated,
    tied=_tied(checkpoint) if checkpoint else tie,
    scale_output=config.get('scale_decoder_outputs', tie),
    buckets=config.get('relative_attention_num_buckets', 32),
    max_distance=config.get('relative_attention_max_distance', 128),
    eps=config.get('layer_norm_epsilon', 1e-6),
    activation=activation(act),
    dropout=config.get('dropout_rate', 0.1),
    attention_dropout=config.get('dropout_rate', 0.1),
    **request.fields,
  )


def _tied(checkpoint: Checkpoint) -> bool:
  """Whether the files hold no head of their own; a copy of the word table is none."""
  if 'lm_head.weight' not in checkpoint.shapes:
    return True
  return 'shared.weight' in checkpoint.shapes and np.array_equal(
    checkpoint.read('lm_head.weight'), checkpoint.read('shared.weight')
  )


def _describe(config: Mapping, model: T5) -> dict:
  return dict(config) | {
    'num_layers': model.depth,
    'num_decoder_layers': model.decoder_depth,
    'tie_word_embeddings': model.tied,
    'scale_decoder_outputs': model.scale_output,
  }


def _example(model: T5) -> tuple:
  tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  return tokens, tokens


T5_FAMILIES = {
  't5': Family(_build, lambda model: T5_GATED if model.gated else T5_V1, _example, _describe)
}
