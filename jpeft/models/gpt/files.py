"""GPT-2 and OPT as Hugging Face stores them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ..families import Family, Request, depth_of, shape_of, with_labels
from ..heads import Heads
from ..io import Checkpoint, Table
from ..nn import activation
from .model import Gpt

Rows = tuple[tuple[str, str, str], ...]

# ---- GPT-2. Its linear maps are [inputs, outputs] on disk; query, key and value lie in one tensor.

_GPT2_ROWS: Rows = (
  ('embed', 'embed', 'wte'),
  ('position', 'embed', 'wpe'),
  ('final_norm', 'norm', 'ln_f'),
  ('decoder/block/norm1', 'norm', 'h.{i}.ln_1'),
  ('decoder/block/attention/query', 'conv1d', 'h.{i}.attn.c_attn'),
  ('decoder/block/attention/key', 'conv1d', 'h.{i}.attn.c_attn'),
  ('decoder/block/attention/value', 'conv1d', 'h.{i}.attn.c_attn'),
  ('decoder/block/attention/out', 'conv1d', 'h.{i}.attn.c_proj'),
  ('decoder/block/norm2', 'norm', 'h.{i}.ln_2'),
  ('decoder/block/mlp/fc1', 'conv1d', 'h.{i}.mlp.c_fc'),
  ('decoder/block/mlp/fc2', 'conv1d', 'h.{i}.mlp.c_proj'),
)
# Of each head: its key, and what follows the family's name in its class.
_GPT2_PURPOSES = {
  'text': ('lm_head', 'LMHeadModel'),
  'classification': ('score', 'ForSequenceClassification'),
  'tokens': ('classifier', 'ForTokenClassification'),
  'questions': ('qa_outputs', 'ForQuestionAnswering'),
}
# Causal masks, which old files have as buffers.
_MASKS = r'h\.\d+\.attn\.(?:masked_)?bias'


def _gpt2(config: Mapping, checkpoint: Checkpoint | None, request: Request) -> Gpt:
  _refuse(
    config,
    scale_attn_weights=True,
    scale_attn_by_inverse_layer_idx=False,
    add_cross_attention=False,
  )
  width = config['n_embd']
  return Gpt(
    width,
    depth_of(config, 'n_layer', request),
    config['n_head'],
    config.get('n_inner') or 4 * width,
    config['vocab_size'],
    config['n_positions'],
    eps=config.get('layer_norm_epsilon', 1e-5),
    activation=activation(config.get('activation_function', 'gelu_new')),
    dropout=config.get('resid_pdrop', 0.1),
    embed_dropout=config.get('embd_pdrop', 0.1),
    attention_dropout=config.get('attn_pdrop', 0.1),
    **_headed(config, checkpoint, request, 'classifier.weight'),
  )


def _gpt2_table(model: Gpt) -> Table:
  return _table(model, 'GPT2', 'transformer.', _GPT2_ROWS, _GPT2_PURPOSES, (_MASKS,))


# ---- OPT.

_OPT_ROWS: Rows = (
  ('embed', 'embed', 'embed_tokens'),
  ('position', 'embed', 'embed_positions'),
  ('project_in', 'dense', 'project_in'),
  ('project_out', 'dense', 'project_out'),
  ('final_norm', 'norm', 'final_layer_norm'),
  ('decoder/block/norm1', 'norm', 'layers.{i}.self_attn_layer_norm'),
  ('decoder/block/attention/query', 'dense', 'layers.{i}.self_attn.q_proj'),
  ('decoder/block/attention/key', 'dense', 'layers.{i}.self_attn.k_proj'),
  ('decoder/block/attention/value', 'dense', 'layers.{i}.self_attn.v_proj'),
  ('decoder/block/attention/out', 'dense', 'layers.{i}.self_attn.out_proj'),
  ('decoder/block/norm2', 'norm', 'layers.{i}.final_layer_norm'),
  ('decoder/block/mlp/fc1', 'dense', 'layers.{i}.fc1'),
  ('decoder/block/mlp/fc2', 'dense', 'layers.{i}.fc2'),
)
_OPT_PURPOSES = {
  'text': ('lm_head', 'ForCausalLM'),
  'classification': ('score', 'ForSequenceClassification'),
  'questions': ('qa_outputs', 'ForQuestionAnswering'),
}


def _opt(config: Mapping, checkpoint: Checkpoint | None, request: Request) -> Gpt:
  _refuse(config, layerdrop=0.0, layer_norm_elementwise_affine=True)
  before = config.get('do_layer_norm_before', True)
  width = config['hidden_size']
  table_width = config.get('word_embed_proj_dim')
  return Gpt(
    width,
    depth_of(config, 'num_hidden_layers', request),
    config['num_attention_heads'],
    config['ffn_dim'],
    config['vocab_size'],
    config['max_position_embeddings'],
    position_offset=2,
    table_width=None if table_width == width else table_width,
    use_bias=config.get('enable_bias', True),
    post_norm=not before,
    final_norm=before and not config.get('_remove_final_layer_norm', False),
    activation=activation(config.get('activation_function', 'relu')),
    dropout=config.get('dropout', 0.1),
    attention_dropout=config.get('attention_dropout', 0.0),
    **_headed(config, checkpoint, request, 'score.weight'),
  )


def _opt_table(model: Gpt) -> Table:
  base, other = 'model.decoder.', 'decoder.'
  if model.head is None:
    base, other = other, base
  table = _table(model, 'OPT', base, _OPT_ROWS, _OPT_PURPOSES, ())
  return table._replace(prefixed=True, other_bases=(other,))


# ---- Both.


def _refuse(config: Mapping, **values: Any) -> None:
  """Raises a ValueError if a key of a config has another value than its own of these."""
  for key, value in values.items():
    if config.get(key, value) != value:
      raise ValueError(f'{key}={config[key]!r} is not supported, only {value!r}')


def _headed(
  config: Mapping, checkpoint: Checkpoint | None, request: Request, of_tokens: str
) -> dict[str, Any]:
  """The fields of a model that say what it gives, and those of the request."""
  head = request.head
  if head not in (None, 'classification') and request.pool is not None:
    raise ValueError(f'head {head!r} reads every token: it takes no pool, got {request.pool!r}')
  classes = None if head == 'questions' else request.num_classes
  if classes is None and head in ('classification', 'tokens'):
    shape = shape_of(checkpoint, 'score.weight' if head == 'classification' else of_tokens)
    classes = shape[0] if shape else None
  tied = config.get('tie_word_embeddings', True)
  if checkpoint is not None and not tied and head == 'text':
    tied = shape_of(checkpoint, 'lm_head.weight') is None
  return {
    'tied': tied,
    'num_classes': classes,
    'head': head,
    'pool': request.pool or config.get('jpeft_pool', 'last'),
    **request.fields,
  }


def _table(
  model: Gpt,
  name: str,
  base: str,
  rows: Rows,
  purposes: Mapping[str, tuple[str, str]],
  ignore: tuple[str, ...],
) -> Table:
  key, purpose = purposes[model.head or 'text']
  tied = model.head == 'text' and model.tied
  head = () if tied or model.head is None else (('head', 'dense', key),)
  # Copies of the word table, and heads that the model does without.
  others = (rf'{key}\..*' for key, _ in purposes.values())
  architectures = (f'{name}Model', name + purpose)
  return Table(base, rows, head, (*ignore, *others), architectures, tied=tied)


def _describe(config: Mapping, model: Gpt, depth: str) -> dict:
  classes = 2 if model.head == 'questions' else model.num_classes
  config = with_labels(config, classes) | {depth: model.depth}
  if model.head == 'text':
    config['tie_word_embeddings'] = model.tied
  else:
    config['jpeft_pool'] = model.pool  # our own key, which transformers ignores
  return config


def example(model: Gpt) -> tuple:
  """Abstract inputs of one call."""
  return (jax.ShapeDtypeStruct((1, min(8, model.positions)), jnp.int32),)


def _heads(purposes: Mapping[str, tuple[str, str]], *others: str) -> Heads:
  return Heads({head: rf'{key}\.weight' for head, (key, _) in purposes.items()}, others, 'text')


GPT_FAMILIES = {
  'gpt2': Family(
    _gpt2,
    _gpt2_table,
    example,
    lambda config, model: _describe(config, model, 'n_layer'),
    sizes={'heads': 'n_head', 'mlp_dim': 'n_inner'},
    heads=_heads(_GPT2_PURPOSES, r'multiple_choice_head\..*'),
  ),
  'opt': Family(
    _opt,
    _opt_table,
    example,
    lambda config, model: _describe(config, model, 'num_hidden_layers'),
    sizes={'heads': 'num_attention_heads', 'mlp_dim': 'ffn_dim'},
    heads=_heads(_OPT_PURPOSES),
  ),
}
