"""Live against transformers: our folders open there, and bare models give the same hidden
states.
"""

import dataclasses

import jax
import numpy as np
import pytest

import jpeft
from jpeft import models
from jpeft.models.nn.positions import relative_buckets
from tests.models.goldens import (
  CAUSAL,
  EXPERTS,
  GOLDEN,
  MODERNBERT,
  NAMES,
  THEIRS,
  UNSCANNED,
  close,
  golden,
  outputs,
)

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings('ignore::DeprecationWarning')]


def their(kind, folder, inputs):
  """The output of a transformers model, which must find every tensor it wants in the folder."""
  model, report = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
  assert not any(report[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
  tensor = lambda x: torch.tensor(x.transpose(0, 3, 1, 2) if x.ndim == 4 else x.astype('int64'))
  with torch.no_grad():
    return model.eval()(**{THEIRS[k]: tensor(v) for k, v in inputs.items()})


@pytest.mark.parametrize(
  'name', (*NAMES, 'beit', 'beit_shared', 'swin', 'convnext', 'convnextv2', *EXPERTS, *MODERNBERT)
)
def test_transformers_opens_what_we_save(name, tmp_path):
  inputs, _ = golden(name)
  loaded = models.load(GOLDEN / name, scan=name not in UNSCANNED)
  moved = jax.tree.map(lambda x: x + 0.01, loaded.variables)
  models.save_pretrained(tmp_path, loaded.model, moved, loaded.config)
  kind = models.load(tmp_path).config['architectures'][0]
  want = their(kind, tmp_path, inputs).logits.numpy()
  want = (
    want * inputs['mask'][..., None] if name in (*CAUSAL, *EXPERTS, 'modernbert_masked') else want
  )
  close(outputs(dataclasses.replace(loaded, variables=moved), inputs), want, 5e-6)


@pytest.mark.parametrize(
  'name,kind',
  (
    ('vit', 'ViTModel'),
    ('deit', 'DeiTModel'),
    ('dinov2', 'Dinov2Model'),
    ('bert', 'BertModel'),
    ('roberta', 'RobertaModel'),
  ),
)
def test_bare_models_equal_transformers(name, kind, tmp_path):
  config = transformers.AutoConfig.from_pretrained(GOLDEN / name)
  torch.manual_seed(0)
  getattr(transformers, kind)(config).save_pretrained(tmp_path)
  inputs, _ = golden(name)
  want = their(kind, tmp_path, inputs)
  hidden = models.load(tmp_path, pool='tokens')
  close(outputs(hidden, inputs), want.last_hidden_state.numpy())
  pooled = models.load(tmp_path, pool='cls')
  close(outputs(pooled, inputs), want.pooler_output.numpy())
  models.save_pretrained(tmp_path / 'again', pooled.model, pooled.variables, pooled.config)
  close(their(kind, tmp_path / 'again', inputs).pooler_output.numpy(), want.pooler_output.numpy())


TEXT_HEADS = ('SequenceClassification', 'TokenClassification', 'QuestionAnswering', 'MaskedLM')
CAUSAL_HEADS = ('SequenceClassification', 'TokenClassification', 'QuestionAnswering', 'CausalLM')
SPARSE = ('Mixtral', 'Qwen2Moe', 'Qwen3Moe')
CLASSES = (
  *(
    (name, f'{name}For{head}')
    for name in ('Bert', 'Roberta', 'XLMRoberta', 'Camembert', 'DistilBert', 'Electra', 'MPNet')
    for head in TEXT_HEADS
  ),
  *(
    (name, f'{name}For{head}')
    for name in ('Llama', 'Mistral', 'Qwen2', 'Qwen3')
    for head in CAUSAL_HEADS
  ),
  *((name, f'{name}{head}') for name in ('T5', 'MT5') for head in ('EncoderModel',)),
  *((name, f'{name}ForTokenClassification') for name in ('T5', 'MT5')),
  ('T5', 'T5ForConditionalGeneration'),
  ('MT5', 'MT5ForConditionalGeneration'),
  ('ViT', 'ViTForImageClassification'),
  ('DeiT', 'DeiTForImageClassification'),
  ('Dinov2WithRegisters', 'Dinov2WithRegistersForImageClassification'),
  ('Beit', 'BeitForImageClassification'),
  *(
    (name, f'{name}For{head}')
    for name in ('Gemma2', 'Phi3')
    for head in ('SequenceClassification', 'TokenClassification', 'CausalLM')
  ),
  *(
    ('GPT2', f'GPT2{head}')
    for head in ('LMHeadModel', *(f'For{head}' for head in CAUSAL_HEADS if head != 'CausalLM'))
  ),
  *(('OPT', f'OPTFor{head}') for head in CAUSAL_HEADS if head != 'TokenClassification'),
  *((name, f'{name}For{head}') for name in SPARSE for head in CAUSAL_HEADS),
  *(('ModernBert', f'ModernBertFor{head}') for head in TEXT_HEADS),
  *(('DebertaV2', f'DebertaV2For{head}') for head in TEXT_HEADS if head != 'MaskedLM'),
)
# transformers finds the last token by the padding before it.
BY_PADDING = ('Mistral', 'Qwen2', 'Qwen3', 'Gemma2', 'Phi3', 'GPT2', 'OPT', *SPARSE)


def tiny(name, kind):
  """A small config of transformers, for a class."""
  from tests.models import make_golden as make

  sizes = make.TINY
  if name == 'DistilBert':
    sizes = make.TINY_DISTILBERT
  elif name in ('Roberta', 'XLMRoberta', 'Camembert'):
    sizes = make.TINY_ROBERTA
  elif name == 'MPNet':
    sizes = {**make.TINY, 'pad_token_id': 1}
  elif name == 'Electra':
    sizes = {**make.TINY, 'embedding_size': 8}
  elif name in ('Llama', 'Mistral', 'Qwen2', 'Qwen3', 'Gemma2'):
    sizes = make.TINY_CAUSAL
  elif name == 'Phi3':
    sizes = {**make.PHI3, **make.LABELS}
  elif name == 'GPT2':
    sizes = {**make.TINY_GPT2, **make.LABELS}
  elif name == 'OPT':
    sizes = {**make.TINY_OPT, **make.LABELS, 'word_embed_proj_dim': 8}
  elif name == 'Mixtral':
    sizes = {**make.TINY_CAUSAL, 'num_local_experts': 4}
  elif name in SPARSE:
    sizes = make.TINY_EXPERTS
  elif name == 'ModernBert':
    sizes = make.TINY_MODERNBERT
  elif name == 'DebertaV2':
    sizes = make.TINY_DEBERTA
  elif name in ('T5', 'MT5'):
    sizes = make.TINY_T5
  elif name in ('ViT', 'DeiT', 'Beit'):
    sizes = make.TINY_IMAGES
  elif name == 'DINOv3ViT':
    sizes = {**make.DINOV3, 'num_register_tokens': 2}
  elif name == 'Dinov2WithRegisters':
    sizes = {k: v for k, v in make.TINY_IMAGES.items() if k != 'intermediate_size'}
  if kind.endswith('QuestionAnswering'):
    sizes = {k: v for k, v in sizes.items() if k not in make.LABELS}
  return getattr(transformers, f'{name}Config')(**sizes)


@pytest.mark.parametrize('name,kind', CLASSES, ids=[kind for _, kind in CLASSES])
def test_every_head_of_every_family_equals_transformers(name, kind, tmp_path):
  from tests.models import make_golden as make

  torch.manual_seed(0)
  config = tiny(name, kind)
  make.perturbed(kind, config).save_pretrained(tmp_path / 'theirs')
  inputs = make.inputs(kind, config)
  if name in BY_PADDING and kind.endswith('SequenceClassification'):
    inputs['tokens'][2] = inputs['tokens'][2, ::-1]
  loaded = models.load(tmp_path / 'theirs')
  models.save_pretrained(tmp_path / 'ours', loaded.model, loaded.variables, loaded.config)
  got = outputs(loaded, inputs)
  for folder in ('theirs', 'ours'):
    model, report = getattr(transformers, kind).from_pretrained(
      tmp_path / folder, output_loading_info=True
    )
    assert not any(report[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
    want = make.logits(model.eval(), inputs)
    if name in ('Llama', 'ModernBert', 'DebertaV2', *BY_PADDING) and want.ndim == 3:
      want = want * inputs['mask'][..., None]
    close(got, want, 5e-6)


@pytest.mark.parametrize(
  'name', ('Dinov2', 'Dinov2WithRegisters', 'DINOv3ViT', 'Beit', 'Llama', 'Electra', 'MPNet')
)
def test_features_without_a_head_equal_transformers(name, tmp_path):
  from tests.models import make_golden as make

  torch.manual_seed(0)
  kind = f'{name}Model'
  if name == 'Dinov2':
    config = transformers.AutoConfig.from_pretrained(GOLDEN / 'dinov2')
  else:
    config = tiny(name, kind)
  make.perturbed(kind, config).save_pretrained(tmp_path)
  inputs = make.inputs(kind, config)
  want = their(kind, tmp_path, inputs)
  tokens = outputs(models.load(tmp_path, pool='tokens'), inputs)
  hidden = want.last_hidden_state.numpy()
  close(tokens, hidden * (inputs['mask'][..., None] if name == 'Llama' else 1))
  pooled = outputs(models.load(tmp_path), inputs)
  if 'pooler_output' in want:
    close(pooled, want.pooler_output.numpy())
  elif name == 'Llama':
    last = [np.flatnonzero(mask)[-1] for mask in inputs['mask']]
    close(pooled, hidden[np.arange(3), last])
  else:
    close(pooled, hidden[:, 0])


@pytest.mark.parametrize('name', ('dinov3', 'dinov3_gated'))
def test_a_bare_dinov3_that_we_save_opens_in_transformers(name, tmp_path):
  inputs, _ = golden(name)
  loaded = models.load(GOLDEN / name, scan=True, pool='tokens')
  moved = jax.tree.map(lambda x: x + 0.01, loaded.variables)
  models.save_pretrained(tmp_path, loaded.model, moved, loaded.config)
  want = their('DINOv3ViTModel', tmp_path, inputs).last_hidden_state.numpy()
  close(outputs(dataclasses.replace(loaded, variables=moved), inputs), want, 5e-6)


@pytest.mark.parametrize(
  'name,kind',
  (('dinov2', 'Dinov2Model'), ('beit_shared', 'BeitModel'), ('dinov3', 'DINOv3ViTModel')),
)
def test_hidden_patches_equal_transformers(name, kind):
  images = golden(name)[0]['images']
  masked = np.random.default_rng(0).random((2, 16)) < 0.5
  model = getattr(transformers, kind).from_pretrained(GOLDEN / name).eval()
  with torch.no_grad():
    pixels = torch.tensor(images.transpose(0, 3, 1, 2))
    want = model(pixels, bool_masked_pos=torch.tensor(masked)).last_hidden_state.numpy()
  loaded = models.load(GOLDEN / name, head=None, pool='tokens')
  close(outputs(loaded, {'images': images, 'masked': masked}), want, 5e-6)


def test_transformers_opens_what_the_original_code_stored(tmp_path):
  from tests.models.io.test_vit_npz import arrays_of

  np.savez(tmp_path / 'vit.npz', **arrays_of())
  inputs, _ = golden('vit')
  loaded = models.load(tmp_path / 'vit.npz')
  models.save_pretrained(tmp_path / 'hf', loaded.model, loaded.variables, loaded.config)
  want = their('ViTForImageClassification', tmp_path / 'hf', inputs).logits.numpy()
  close(outputs(loaded, inputs), want)


@pytest.mark.parametrize(
  'name,bare', (('clip', 'CLIPVisionModel'), ('siglip', 'SiglipVisionModel'))
)
@pytest.mark.parametrize('pool', (None, 'mean', 'tokens'))
def test_transformers_opens_the_towers_that_we_save(name, bare, pool, tmp_path):
  inputs, _ = golden(name)
  labels = '_labels' if pool == 'mean' else ''
  loaded = models.load(GOLDEN / f'{name}{labels}', scan=True, pool=pool)
  moved = jax.tree.map(lambda x: x + 0.01, loaded.variables)
  models.save_pretrained(tmp_path, loaded.model, moved, loaded.config)
  got = outputs(dataclasses.replace(loaded, variables=moved), inputs)
  kind = bare.replace('VisionModel', 'ForImageClassification') if labels else bare
  model, report = getattr(transformers, kind).from_pretrained(tmp_path, output_loading_info=True)
  # What the chosen output does not read.
  unread = {(None, 'clip'): (), (None, 'siglip'): ()}.get((pool, name), ('post_l', 'head.'))
  missing = [key.removeprefix('vision_model.') for key in report['missing_keys']]
  assert all(key.startswith(unread) for key in missing) and not report['unexpected_keys']
  with torch.no_grad():
    out = model.eval()(torch.tensor(inputs['images'].transpose(0, 3, 1, 2)))
  key = {None: 'pooler_output', 'mean': 'logits', 'tokens': 'last_hidden_state'}[pool]
  close(got, out[key].numpy(), 5e-6)


def test_new_classes_open_in_transformers(tmp_path):
  inputs, _ = golden('dinov2')
  loaded = models.load(GOLDEN / 'dinov2', num_classes=7, image_size=28, layers=1)
  models.save_pretrained(tmp_path, loaded.model, loaded.variables, loaded.config)
  want = their('Dinov2ForImageClassification', tmp_path, inputs).logits.numpy()
  assert want.shape == (2, 7)
  np.testing.assert_allclose(outputs(loaded, inputs), want, atol=1e-6)


@pytest.mark.parametrize('bidirectional', (False, True))
@pytest.mark.parametrize('buckets,distance', ((32, 128), (8, 12), (16, 64)))
def test_relative_buckets_equal_transformers(bidirectional, buckets, distance):
  bucket = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket
  gap = torch.arange(300)[None] - torch.arange(300)[:, None]
  want = bucket(gap, bidirectional, buckets, distance).numpy()
  got = relative_buckets(
    300, 300, buckets=buckets, max_distance=distance, bidirectional=bidirectional
  )
  np.testing.assert_array_equal(got, want)
  assert got.min() == 0 and got.max() == buckets - 1


@pytest.mark.filterwarnings(
  'ignore::FutureWarning'
)  # of peft, which calls what transformers will rename
@pytest.mark.parametrize('name', ('bert', 'llama', 'beit'))
@pytest.mark.parametrize('head', (False, True))
@pytest.mark.parametrize('make', (jpeft.lora, jpeft.dora), ids=('lora', 'dora'))
def test_peft_opens_the_adapters_we_save(name, head, make, tmp_path):
  peft = pytest.importorskip('peft')
  inputs, _ = golden(name)
  loaded = models.load(GOLDEN / name, scan=True)
  method = jpeft.chain(make(3, 5, '{linear}'), *([jpeft.tune('{head}')] if head else []))
  tuned = jpeft.attach(loaded.model, method, loaded.variables, **inputs)
  theta = jax.tree.map(lambda x: x + 0.02, jax.jit(tuned.init)(jax.random.key(0), loaded.variables))
  jpeft.save_adapter(tmp_path / 'adapter', loaded, theta, 5, base=str(tmp_path / 'base'))
  models.save_pretrained(tmp_path / 'base', loaded.model, loaded.variables, loaded.config)
  kind = models.load(tmp_path / 'base').config['architectures'][0]
  base = getattr(transformers, kind).from_pretrained(tmp_path / 'base')
  model = peft.PeftModel.from_pretrained(base, tmp_path / 'adapter').eval()
  tensor = lambda x: torch.tensor(x.transpose(0, 3, 1, 2) if x.ndim == 4 else x.astype('int64'))
  with torch.no_grad():
    want = model(**{THEIRS[k]: tensor(v) for k, v in inputs.items()}).logits.numpy()
  mask = inputs['mask'][..., None] if name in CAUSAL else 1
  got = jax.jit(tuned.apply)(theta, loaded.variables, **inputs)
  close(got * mask, want * mask, 2e-5)
  _, again = jpeft.load_adapter(tmp_path / 'adapter', loaded)
  jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(again), jax.tree.leaves(theta))


@pytest.mark.parametrize('buckets,furthest,tokens', [(256, 512, 512), (32, 128, 300), (4, 24, 24)])
def test_buckets_of_distances_equal_those_of_transformers(buckets, furthest, tokens):
  from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

  from jpeft.models.deberta.model import Distances

  ids = torch.zeros(1, tokens, 1)
  theirs = build_relative_position(ids, ids, buckets, furthest)[0].numpy()
  ours = Distances(buckets, furthest).rows(tokens)
  np.testing.assert_array_equal(ours, np.clip(theirs + buckets, 0, 2 * buckets - 1))
