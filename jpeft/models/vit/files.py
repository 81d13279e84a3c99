"""ViT, DeiT, DINOv2, DINOv3, BEiT and the encoder of ViT-MAE as Hugging Face stores them."""

import functools
from collections.abc import Mapping

from ..families import HALF, IMAGENET, Family, Request, depth_of, shape_of, with_labels
from ..heads import Heads
from ..io import Checkpoint, Table
from ..nn import (
  activation,
  grid,
  image_example,
  image_size_of,
  patch_size_of,
  resize_distances,
  resize_grid,
  size_in_config,
)
from .model import ViT

_EMBED = (
  ('embed/cls', 'param', 'embeddings.cls_token'),
  ('embed/distill', 'param', 'embeddings.distillation_token'),
  ('embed/mask', 'param', 'embeddings.mask_token'),
  ('embed/registers', 'param', 'embeddings.register_tokens'),
  ('embed/position', 'param', 'embeddings.position_embeddings'),
  ('embed/patch', 'conv', 'embeddings.patch_embeddings.projection'),
  ('final_norm', 'norm', 'layernorm'),
)
_ATTENTION = (
  ('encoder/block/attention/query', 'dense', 'encoder.layer.{i}.attention.attention.query'),
  ('encoder/block/attention/key', 'dense', 'encoder.layer.{i}.attention.attention.key'),
  ('encoder/block/attention/value', 'dense', 'encoder.layer.{i}.attention.attention.value'),
  ('encoder/block/attention/out', 'dense', 'encoder.layer.{i}.attention.output.dense'),
)
# Names in memory, from transformers 5 on.
_ATTENTION_RENAMED = (
  ('attention.attention.query', 'attention.q_proj'),
  ('attention.attention.key', 'attention.k_proj'),
  ('attention.attention.value', 'attention.v_proj'),
  ('attention.output.dense', 'attention.o_proj'),
)
_BLOCK_RENAMED = (
  ('intermediate.dense', 'mlp.fc1'),
  ('output.dense', 'mlp.fc2'),
  ('encoder.layer.', 'layers.'),
)
_DISTANCES = 'relative_position_bias.relative_position_bias_table'
# Heads that the model does without, which is decided before, and parts for masked image modelling.
_IGNORE = (r'pooler\..*', r'(\w+_)?classifier\..*', r'embeddings\.mask_token', r'decoder\..*')

VIT = Table(
  base='vit.',
  rows=_EMBED
  + _ATTENTION
  + (
    ('encoder/block/norm1', 'norm', 'encoder.layer.{i}.layernorm_before'),
    ('encoder/block/norm2', 'norm', 'encoder.layer.{i}.layernorm_after'),
    ('encoder/block/mlp/fc1', 'dense', 'encoder.layer.{i}.intermediate.dense'),
    ('encoder/block/mlp/fc2', 'dense', 'encoder.layer.{i}.output.dense'),
    ('pooler', 'dense', 'pooler.dense'),
  ),
  head=(('head', 'dense', 'classifier'),),
  ignore=_IGNORE,
  architectures=('ViTModel', 'ViTForImageClassification'),
  renamed=_ATTENTION_RENAMED + _BLOCK_RENAMED,
)

DEIT = VIT._replace(base='deit.', architectures=('DeiTModel', 'DeiTForImageClassification'))
# Trained by distillation: a second head reads the distillation token.
DEIT_TEACHER = DEIT._replace(
  head=(('head', 'dense', 'cls_classifier'), ('head_distill', 'dense', 'distillation_classifier')),
  architectures=('DeiTModel', 'DeiTForImageClassificationWithTeacher'),
)

DINOV2 = Table(
  base='dinov2.',
  rows=_EMBED
  + _ATTENTION
  + (
    ('encoder/block/norm1', 'norm', 'encoder.layer.{i}.norm1'),
    ('encoder/block/norm2', 'norm', 'encoder.layer.{i}.norm2'),
    ('encoder/block/mlp/fc1', 'dense', 'encoder.layer.{i}.mlp.fc1'),
    ('encoder/block/mlp/fc2', 'dense', 'encoder.layer.{i}.mlp.fc2'),
    ('encoder/block/scale1/scale', 'param', 'encoder.layer.{i}.layer_scale1.lambda1'),
    ('encoder/block/scale2/scale', 'param', 'encoder.layer.{i}.layer_scale2.lambda1'),
  ),
  head=(('head', 'dense', 'classifier'),),
  ignore=_IGNORE,
  architectures=('Dinov2Model', 'Dinov2ForImageClassification'),
  renamed=_ATTENTION_RENAMED,
)
DINOV2_REGISTERS = DINOV2._replace(
  base='dinov2_with_registers.',
  architectures=('Dinov2WithRegistersModel', 'Dinov2WithRegistersForImageClassification'),
)

BEIT = Table(
  base='beit.',
  rows=tuple(row for row in VIT.rows if row[0] not in ('embed/mask', 'pooler'))
  + (
    ('embed/mask', 'token', 'embeddings.mask_token'),
    ('encoder/position_bias/embedding', 'param', f'encoder.{_DISTANCES}'),
    (
      'encoder/block/position_bias/embedding',
      'param',
      f'encoder.layer.{{i}}.attention.attention.{_DISTANCES}',
    ),
    ('encoder/block/scale1/scale', 'param', 'encoder.layer.{i}.lambda_1'),
    ('encoder/block/scale2/scale', 'param', 'encoder.layer.{i}.lambda_2'),
  ),
  head=(('head', 'dense', 'classifier'),),
  # Older files have the numbers of distances, which follow from the image size.
  ignore=(
    *_IGNORE,
    r'.*relative_position_index',
    r'lm_head\..*',
    r'(decode|auxiliary)_head\..*',
    r'fpn\d\..*',
  ),
  architectures=('BeitModel', 'BeitForImageClassification'),
  renamed=(
    (f'attention.attention.{_DISTANCES}', _DISTANCES),
    ('encoder.relative_position_bias', 'shared_position_bias'),
    *_ATTENTION_RENAMED,
    *_BLOCK_RENAMED,
  ),
)
# The last norm reads the mean of the patches. One of all tokens belongs to a head of masked images,
# which has no pooler: a head of labels then makes its norm fresh.
BEIT_POOLED = BEIT._replace(
  rows=tuple(row for row in BEIT.rows if row[0] != 'final_norm')
  + (('pool_norm', 'norm', 'pooler.layernorm'),),
  ignore=(*BEIT.ignore, r'layernorm\..*'),
  fresh=('pool_norm',),
)

# transformers has no class of it with a head: a file with one opens there as the bare model.
DINOV3 = Table(
  base='',
  rows=(
    ('embed/cls', 'param', 'embeddings.cls_token'),
    ('embed/mask', 'token', 'embeddings.mask_token'),
    ('embed/registers', 'param', 'embeddings.register_tokens'),
    ('embed/patch', 'conv', 'embeddings.patch_embeddings'),
    ('encoder/block/norm1', 'norm', 'layer.{i}.norm1'),
    ('encoder/block/norm2', 'norm', 'layer.{i}.norm2'),
    ('encoder/block/attention/query', 'dense', 'layer.{i}.attention.q_proj'),
    ('encoder/block/attention/key', 'dense', 'layer.{i}.attention.k_proj'),
    ('encoder/block/attention/value', 'dense', 'layer.{i}.attention.v_proj'),
    ('encoder/block/attention/out', 'dense', 'layer.{i}.attention.o_proj'),
    ('encoder/block/mlp/fc1', 'dense', 'layer.{i}.mlp.up_proj'),
    ('encoder/block/mlp/gate', 'dense', 'layer.{i}.mlp.gate_proj'),
    ('encoder/block/mlp/fc2', 'dense', 'layer.{i}.mlp.down_proj'),
    ('encoder/block/scale1/scale', 'param', 'layer.{i}.layer_scale1.lambda1'),
    ('encoder/block/scale2/scale', 'param', 'layer.{i}.layer_scale2.lambda1'),
    ('final_norm', 'norm', 'norm'),
  ),
  head=(('head', 'dense', 'classifier'),),
  ignore=(*_IGNORE, r'embeddings\.register_tokens'),  # stored even where there are none
  architectures=('DINOv3ViTModel', 'DINOv3ViTModel'),
  renamed=(('layer.', 'model.layer.'),),
)
# Others paint pixels (ViT-MAE, classes for masked images), name patches (BEiT), or stand behind a
# pooler.
_HEADS = Heads(
  {'classification': r'(cls_)?classifier\.weight'},
  others=(
    r'decoder\..*',
    r'lm_head\..*',
    r'(decode|auxiliary)_head\..*',
    r'pre_logits_classifier\..*',
  ),
)


def _classes(config: Mapping, checkpoint: Checkpoint | None, request: Request) -> int | None:
  """The number of classes: that of the request, else that of the head in the files."""
  if request.head is None or request.num_classes is not None:
    return request.num_classes
  names = ['classifier']
  if config['model_type'] == 'deit':
    names = ['cls_classifier', 'classifier']
  for name in names:
    shape = shape_of(checkpoint, f'{name}.weight')
    if shape:
      return shape[0]
  return None


def _build(config: Mapping, checkpoint: Checkpoint | None, request: Request) -> ViT:
  kind = config['model_type']
  width = config['hidden_size']
  if config.get('use_swiglu_ffn'):
    raise ValueError(
      'DINOv2 with use_swiglu_ffn (the giant variant) is not supported; its small, '
      'base and large variants are'
    )
  dinov2 = kind.startswith('dinov2')
  pool = 'cls'
  layer_scale = None
  if dinov2:
    layer_scale = config.get('layerscale_value', 1.0)
    if request.head is not None:
      pool = 'cls_mean'
  pool = request.pool or config.get('jpeft_pool', pool)
  classes = _classes(config, checkpoint, request)
  has_pooler = shape_of(checkpoint, 'pooler.dense.weight') is not None
  has_distill_head = shape_of(checkpoint, 'distillation_classifier.weight') is not None
  return ViT(
    width,
    depth_of(config, 'num_hidden_layers', request),
    config['num_attention_heads'],
    mlp_dim=config.get('intermediate_size') or int(width * config.get('mlp_ratio', 4)),
    patch_size=patch_size_of(config),
    image_size=request.image_size or image_size_of(config),
    num_classes=classes,
    pool=pool,
    pooler=has_pooler and classes is None and pool == 'cls' and not dinov2,
    distill=kind == 'deit',
    distill_head=has_distill_head and classes is not None,
    registers=config.get('num_register_tokens', 4) if kind == 'dinov2_with_registers' else 0,
    mask_token=dinov2 and config.get('use_mask_token', True),
    layer_scale=layer_scale,
    qkv_bias=config.get('qkv_bias', True),
    eps=config.get('layer_norm_eps', 1e-12),
    activation=activation(config.get('hidden_act', 'gelu')),
    dropout=config.get('hidden_dropout_prob', 0.0),
    attention_dropout=config.get('attention_probs_dropout_prob', 0.0),
    **request.fields,
  )


def _build_beit(config: Mapping, checkpoint: Checkpoint | None, request: Request) -> ViT:
  position_bias = None
  if config.get('use_relative_position_bias', False):
    position_bias = 'own'
  if config.get('use_shared_relative_position_bias', False):
    if position_bias is not None:
      raise ValueError(
        'use_relative_position_bias with use_shared_relative_position_bias: a position bias of '
        'each block beside a shared one is not supported; one of them is'
      )
    position_bias = 'shared'
  by_mean = config.get('use_mean_pooling', True)
  pool = 'mean' if by_mean else 'cls'
  scale = config.get('layer_scale_init_value', 0.1)
  return ViT(
    config['hidden_size'],
    depth_of(config, 'num_hidden_layers', request),
    config['num_attention_heads'],
    mlp_dim=config.get('intermediate_size', 3072),
    patch_size=patch_size_of(config),
    image_size=request.image_size or image_size_of(config),
    num_classes=_classes(config, checkpoint, request),
    pool=request.pool or config.get('jpeft_pool', pool),
    mask_token=config.get('use_mask_token', False),
    position=config.get('use_absolute_position_embeddings', False),
    position_bias=position_bias,
    norm_pooled=by_mean,
    layer_scale=scale if scale > 0 else None,
    qkv_bias=(True, False, True),
    head_dim=config.get('head_dim'),
    eps=config.get('layer_norm_eps', 1e-12),
    activation=activation(config.get('hidden_act', 'gelu')),
    dropout=config.get('hidden_dropout_prob', 0.0),
    attention_dropout=config.get('attention_probs_dropout_prob', 0.0),
    **request.fields,
  )


def _build_dinov3(config: Mapping, checkpoint: Checkpoint | None, request: Request) -> ViT:
  pool = 'cls' if request.head is None else 'cls_mean'
  registers = config.get('num_register_tokens', 0)
  stored = shape_of(checkpoint, 'embeddings.register_tokens')
  if stored is not None and stored[1] != registers:
    raise ValueError(
      f'num_register_tokens={registers}, and {checkpoint.folder} has {stored[1]} register tokens'
    )
  return ViT(
    config['hidden_size'],
    depth_of(config, 'num_hidden_layers', request),
    config['num_attention_heads'],
    mlp_dim=config['intermediate_size'],
    patch_size=patch_size_of(config),
    image_size=request.image_size or image_size_of({'image_size': 224, **config}),
    num_classes=_classes(config, checkpoint, request),
    pool=request.pool or config.get('jpeft_pool', pool),
    registers=registers,
    mask_token=True,
    position=False,
    rope_theta=config.get('rope_theta', 100.0),
    layer_scale=config.get('layerscale_value', 1.0),
    qkv_bias=(
      config.get('query_bias', True),
      config.get('key_bias', False),
      config.get('value_bias', True),
    ),
    out_bias=config.get('proj_bias', True),
    mlp_bias=config.get('mlp_bias', True),
    gated=config.get('use_gated_mlp', False),
    eps=config.get('layer_norm_eps', 1e-5),
    activation=activation(config.get('hidden_act', 'gelu')),
    attention_dropout=config.get('attention_dropout', 0.0),
    **request.fields,
  )


def _describe(config: Mapping, model: ViT) -> dict:
  config = with_labels(config, model.num_classes)
  if model.depth != config['num_hidden_layers']:
    for key in ('stage_names', 'out_features', 'out_indices'):
      config.pop(key, None)  # these name layers that may be gone
  return config | {
    'num_hidden_layers': model.depth,
    'jpeft_pool': model.pool,  # our own key, which transformers ignores
    'image_size': size_in_config(model),
  }


def _describe_mae(config: Mapping, model: ViT) -> dict:
  """That of a ViT, which the encoder of a ViT-MAE is."""
  own = ('mask_ratio', 'norm_pix_loss')
  config = {
    key: value for key, value in config.items() if key not in own and not key.startswith('decoder_')
  }
  return _describe(config | {'model_type': 'vit'}, model)


def position_edits(config: Mapping, model: ViT) -> dict:
  """{path: function of an array} that resizes positions to the image size of a model."""
  old = grid(image_size_of(config), model.patch_size)
  new = grid(model.image_size, model.patch_size)
  if old == new:
    return {}
  distances = functools.partial(resize_distances, old=old, new=new)
  learned = functools.partial(resize_grid, old=old, new=new)
  edits = {
    'embed/position': learned,
    'patches/position': learned,
    'encoder/position_bias/embedding': distances,
  }
  for block in ('blocks', *(f'block_{i}' for i in range(model.depth))):
    edits[f'encoder/{block}/position_bias/embedding'] = distances
  return edits


def _deit_table(model: ViT) -> Table:
  if model.distill_head:
    return DEIT_TEACHER
  return DEIT


def _beit_table(model: ViT) -> Table:
  if model.norm_pooled:
    return BEIT_POOLED
  return BEIT


_family = functools.partial(
  Family,
  example=image_example,
  describe=_describe,
  edits=position_edits,
  sizes={'heads': 'num_attention_heads', 'mlp_dim': 'intermediate_size'},
  heads=_HEADS,
)
_vit = functools.partial(_family, _build)
# Configs of DINOv2 have a ratio of integers in place of the hidden width of the MLPs.
_dinov2 = functools.partial(_vit, colours=IMAGENET, sizes={'heads': 'num_attention_heads'})
VIT_FAMILIES = {
  'vit': _vit(table=lambda model: VIT, colours=HALF),
  'vit_mae': _vit(table=lambda model: VIT, colours=IMAGENET, describe=_describe_mae),
  'deit': _vit(table=_deit_table, colours=IMAGENET),
  'dinov2': _dinov2(table=lambda model: DINOV2),
  'dinov2_with_registers': _dinov2(table=lambda model: DINOV2_REGISTERS),
  'dinov3_vit': _family(_build_dinov3, table=lambda model: DINOV3, colours=IMAGENET),
  'beit': _family(_build_beit, table=_beit_table, colours=HALF),
}
