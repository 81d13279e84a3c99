"""ViTs in the files of the original JAX code, made here of a file of Hugging Face."""

import jax
import numpy as np
import pytest

from jpeft import models
from tests.models.goldens import GOLDEN, close, golden, outputs

HEADS = 4
IN_BLOCK = {
  'LayerNorm_0': 'layernorm_before',
  'LayerNorm_2': 'layernorm_after',
  'MultiHeadDotProductAttention_1/query': 'attention.attention.query',
  'MultiHeadDotProductAttention_1/key': 'attention.attention.key',
  'MultiHeadDotProductAttention_1/value': 'attention.attention.value',
  'MultiHeadDotProductAttention_1/out': 'attention.output.dense',
  'MlpBlock_3/Dense_0': 'intermediate.dense',
  'MlpBlock_3/Dense_1': 'output.dense',
}


def arrays_of(head=True, pre_logits=False):
  """{name: array} as the original code stores them."""
  hf = models.read_tensors(GOLDEN / 'vit' / 'model.safetensors')
  found = {
    'cls': hf['vit.embeddings.cls_token'],
    'embedding/kernel': hf['vit.embeddings.patch_embeddings.projection.weight'].transpose(
      2, 3, 1, 0
    ),
    'embedding/bias': hf['vit.embeddings.patch_embeddings.projection.bias'],
    'Transformer/posembed_input/pos_embedding': hf['vit.embeddings.position_embeddings'],
    'Transformer/encoder_norm/scale': hf['vit.layernorm.weight'],
    'Transformer/encoder_norm/bias': hf['vit.layernorm.bias'],
  }
  if head:
    found |= {'head/kernel': hf['classifier.weight'].T, 'head/bias': hf['classifier.bias']}
  if pre_logits:
    found |= {'pre_logits/kernel': np.eye(24, dtype='f'), 'pre_logits/bias': np.zeros(24, 'f')}
  for layer in range(2):
    for ours, theirs in IN_BLOCK.items():
      weight = hf[f'vit.encoder.layer.{layer}.{theirs}.weight']
      bias = hf[f'vit.encoder.layer.{layer}.{theirs}.bias']
      name = 'scale' if weight.ndim == 1 else 'kernel'
      weight = weight.T
      if ours.endswith(('query', 'key', 'value')):
        weight, bias = weight.reshape(24, HEADS, 6), bias.reshape(HEADS, 6)
      if ours.endswith('out'):
        weight = weight.reshape(HEADS, 6, 24)
      found[f'Transformer/encoderblock_{layer}/{ours}/{name}'] = weight
      found[f'Transformer/encoderblock_{layer}/{ours}/bias'] = bias
  return found


@pytest.mark.parametrize('scan', [False, True])
def test_a_file_of_the_original_code_is_the_same_model(scan, tmp_path):
  np.savez(tmp_path / 'vit.npz', **arrays_of())
  inputs, _ = golden('vit')
  loaded = models.load(tmp_path / 'vit.npz', scan=scan)
  same = models.load(GOLDEN / 'vit', scan=scan)
  assert loaded.model == same.model.clone(eps=1e-6, activation=models.gelu_tanh)
  jax.tree.map(np.testing.assert_array_equal, loaded.variables, same.variables)
  assert loaded.tokenizer is None and loaded.preprocess['mean'] == (0.5,) * 3
  assert list(loaded.files) == ['vit.npz']
  models.save_pretrained(tmp_path / 'hf', loaded.model, loaded.variables, loaded.config)
  again = models.load(tmp_path / 'hf', scan=scan)
  np.testing.assert_array_equal(outputs(again, inputs), outputs(loaded, inputs))
  fresh = models.load(tmp_path / 'vit.npz', num_classes=5, image_size=42)
  assert fresh.variables['params']['embed']['position'].shape == (1, 37, 24)
  described = models.describe(tmp_path / 'vit.npz', scan=scan)
  assert described.model == loaded.model


def original(arrays, images):
  """What the original code computes, written for its own names and shapes, in float64."""
  arrays = {name: x.astype('float64') for name, x in arrays.items()}

  def norm(name, x):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    return x * arrays[f'{name}/scale'] + arrays[f'{name}/bias']

  def dense(name, x, spec):
    return np.einsum(spec, x, arrays[f'{name}/kernel']) + arrays[f'{name}/bias']

  patches = images.reshape(len(images), 4, 7, 4, 7, 3)
  x = dense('embedding', patches, 'brhcwi,hwid->brcd').reshape(len(images), 16, -1)
  x = np.concatenate([np.broadcast_to(arrays['cls'], (len(x), 1, x.shape[-1])), x], 1)
  x = x + arrays['Transformer/posembed_input/pos_embedding']
  for layer in range(2):
    block = f'Transformer/encoderblock_{layer}'
    attention = f'{block}/MultiHeadDotProductAttention_1'
    y = norm(f'{block}/LayerNorm_0', x)
    query, key, value = (
      dense(f'{attention}/{name}', y, 'bnd,dhk->bnhk') for name in ('query', 'key', 'value')
    )
    weights = np.exp(np.einsum('bnhk,bmhk->bhnm', query, key) / np.sqrt(query.shape[-1]))
    weights /= weights.sum(-1, keepdims=True)
    y = np.einsum('bhnm,bmhk->bnhk', weights, value)
    x = x + dense(f'{attention}/out', y, 'bnhk,hkd->bnd')
    y = dense(f'{block}/MlpBlock_3/Dense_0', norm(f'{block}/LayerNorm_2', x), 'bnd,dm->bnm')
    y = y / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    x = x + dense(f'{block}/MlpBlock_3/Dense_1', y, 'bnm,md->bnd')
  x = norm('Transformer/encoder_norm', x)[:, 0]
  if 'pre_logits/kernel' in arrays:
    x = np.tanh(dense('pre_logits', x, 'bd,de->be'))
  return dense('head', x, 'bd,dc->bc') if 'head/kernel' in arrays else x


@pytest.mark.parametrize('head,pre_logits', [(True, False), (False, True), (False, False)])
def test_outputs_equal_those_of_the_original_code(head, pre_logits, tmp_path):
  arrays = arrays_of(head, pre_logits)
  if pre_logits:
    kernel = np.random.default_rng(0).normal(size=(24, 24)).astype('f') / 5
    arrays['pre_logits/kernel'] = kernel
  np.savez(tmp_path / 'vit.npz', **arrays)
  inputs, _ = golden('vit')
  close(outputs(models.load(tmp_path / 'vit.npz'), inputs), original(arrays, inputs['images']))


def test_a_table_of_another_image_size_is_resized_on_request_alone(tmp_path):
  np.savez(tmp_path / 'vit.npz', **arrays_of())
  large = golden('vit')[1]['large_images']
  with pytest.raises(ValueError, match='images of 42x42 pixels do not fit a model made for 28x28'):
    outputs(models.load(tmp_path / 'vit.npz'), {'images': large})
  # The same table as in the file of Hugging Face, whose resizing is compared with transformers.
  got = models.load(tmp_path / 'vit.npz', image_size=42).variables['params']['embed']['position']
  want = models.load(GOLDEN / 'vit', image_size=42).variables['params']['embed']['position']
  np.testing.assert_array_equal(got, want)
  wide = arrays_of() | {'Transformer/posembed_input/pos_embedding': np.ones((1, 21, 24), 'f')}
  np.savez(tmp_path / 'vit.npz', **wide)
  with pytest.raises(ValueError, match=r'has the shape \[1, 21, 24\], the model needs'):
    models.load(tmp_path / 'vit.npz')


def test_a_classifier_behind_pre_logits_is_refused_by_name(tmp_path):
  file = tmp_path / 'vit.npz'
  np.savez(file, **arrays_of(pre_logits=True))
  with pytest.raises(ValueError, match="jpeft does not have, 'pre_logits_classifier.*head=None"):
    models.load(file)
  assert models.load(file, head=None).model.pooler
  assert not models.load(file, num_classes=3).model.pooler
  np.savez(file, **arrays_of(pre_logits=True, head=False))
  assert models.load(file).model.pooler


def test_other_files_are_refused(tmp_path):
  file = tmp_path / 'vit.npz'
  np.savez(file, other=np.ones(3))
  with pytest.raises(ValueError, match='no plain ViT of the original JAX code: it has other'):
    models.load(file)
  np.savez(file, **arrays_of(), extra=np.ones(3))
  with pytest.raises(ValueError, match="unexpected 'extra' of shape"):
    models.load(file)
  np.savez(file, cls=np.array([object()]))
  with pytest.raises(ValueError, match='cls.npy holds objects, which are not read'):
    models.load(file)
  file.write_bytes(b'no zip')
  with pytest.raises(ValueError, match='is no readable .npz file'):
    models.load(file)
