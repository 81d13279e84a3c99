"""ConvNeXt and ConvNeXt V2 as Hugging Face stores them."""

import functools
from collections.abc import Mapping

from ..families import IMAGENET, Family, Request, check_whole, classes_of, with_labels
from ..heads import Heads
from ..io import Checkpoint, Table
from ..nn import activation, image_example, image_size_of, patch_size_of, size_in_config
from .model import ConvNeXt

_EMBED = (
  ('embed/patch', 'conv', 'embeddings.patch_embeddings'),
  ('embed/norm', 'norm', 'embeddings.layernorm'),
  ('final_norm', 'norm', 'layernorm'),
)
# Of a stage.
_STAGE = (
  ('merge/norm', 'norm', 'downsampling_layer.0'),
  ('merge/reduction', 'conv', 'downsampling_layer.1'),
  ('block/depthwise', 'conv', 'layers.{i}.dwconv'),
  ('block/norm', 'norm', 'layers.{i}.layernorm'),
  ('block/mlp/fc1', 'dense', 'layers.{i}.pwconv1'),
  ('block/mlp/hidden_norm', 'channels', 'layers.{i}.grn'),
  ('block/mlp/fc2', 'dense', 'layers.{i}.pwconv2'),
  ('block/scale/scale', 'param', 'layers.{i}.layer_scale_parameter'),
)


def _table(model: ConvNeXt) -> Table:
  stages = []
  for i in range(len(model.depths)):
    for path, kind, key in _STAGE:
      stages.append((f'encoder/stage_{i}/{path}', kind, f'encoder.stages.{i}.{key}'))
  name = 'ConvNextV2' if model.response_norm else 'ConvNext'
  return Table(
    base=f'{name.lower()}.',
    rows=(*_EMBED, *stages),
    head=(('head', 'dense', 'classifier'),),
    # Hidden states that are not pooled are not normalised.
    ignore=(r'classifier\..*', r'layernorm\..*'),
    architectures=(f'{name}Model', f'{name}ForImageClassification'),
    fresh=(),
  )


def _build(
  config: Mapping, checkpoint: Checkpoint | None, request: Request, is_v2: bool
) -> ConvNeXt:
  check_whole(request)
  scale = None if is_v2 else config.get('layer_scale_init_value', 1e-6)
  return ConvNeXt(
    tuple(config['hidden_sizes']),
    tuple(config['depths']),
    patch_size=patch_size_of({'patch_size': 4, **config}),
    image_size=request.image_size or image_size_of({'image_size': 224, **config}),
    num_classes=classes_of(checkpoint, request),
    pool=request.pool or config.get('jpeft_pool', 'mean'),
    response_norm=is_v2,
    layer_scale=scale if scale and scale > 0 else None,
    eps=config.get('layer_norm_eps', 1e-12),
    activation=activation(config.get('hidden_act', 'gelu')),
    **request.fields,
  )


def _describe(config: Mapping, model: ConvNeXt) -> dict:
  config = with_labels(config, model.num_classes)
  return config | {'jpeft_pool': model.pool, 'image_size': size_in_config(model)}


def _family(is_v2: bool) -> Family:
  return Family(
    functools.partial(_build, is_v2=is_v2),
    _table,
    image_example,
    _describe,
    colours=IMAGENET,
    heads=Heads({'classification': r'classifier\.weight'}),
  )


CONVNEXT_FAMILIES = {'convnext': _family(is_v2=False), 'convnextv2': _family(is_v2=True)}
