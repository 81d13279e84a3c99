"""Live against peft: its folders compute here what they compute there, and ours there."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import jpeft
from jpeft import models
from jpeft.export.peft_config import KNOWN
from tests.fixtures import noisy
from tests.models.goldens import CAUSAL, GOLDEN, THEIRS, close, golden

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
peft = pytest.importorskip('peft')
pytestmark = [
  pytest.mark.parity,
  pytest.mark.filterwarnings('ignore'),  # of peft, which calls what transformers will rename
]
MODELS = ('bert', 'roberta', 'deberta', 'vit', 'dinov2', 'beit', 't5', 'llama', 'qwen2')
# {model: (modules of which one is adapted, a head or a norm that is saved whole)}
PARTS = {
  'bert': ('query', 'classifier'),
  'roberta': ('query', 'classifier'),
  'deberta': ('query_proj', 'classifier'),
  'vit': ('q_proj', 'classifier'),
  'dinov2': ('q_proj', 'classifier'),
  'beit': ('q_proj', 'classifier'),
  't5': ('q', 'final_layer_norm'),
  'llama': ('q_proj', 'lm_head'),
  'qwen2': ('q_proj', 'norm'),
}
KINDS = {
  'lora': {},
  'rslora': {'use_rslora': True, 'init_lora_weights': 'gaussian'},
  'dora': {'use_dora': True},
  'patterns': {'rank_pattern': {'{q}': 3}, 'alpha_pattern': {r'.*1.*{q}': 9, r'.*0.*{q}': -2}},
  'pissa': {'init_lora_weights': 'pissa'},
  'olora': {'init_lora_weights': 'olora'},
  'bias_all': {'bias': 'all'},
  'bias_lora_only': {'bias': 'lora_only'},
  'modules': {'modules_to_save': ['{saved}']},
}


def base_of(name):
  kind = json.loads((GOLDEN / name / 'config.json').read_text())['architectures'][0]
  return getattr(transformers, kind).from_pretrained(GOLDEN / name).eval()


def their(model, name):
  """What a torch model gives on the inputs of a golden; zero where a decoder promises nothing."""
  inputs, _ = golden(name)

  def tensor(x):
    if x.ndim == 4:
      return torch.tensor(x.transpose(0, 3, 1, 2)).to(next(model.parameters()).dtype)
    return torch.tensor(x.astype('int64'))

  with torch.no_grad():
    out = model.eval()(**{THEIRS[k]: tensor(v) for k, v in inputs.items()}).logits.numpy()
  if name not in CAUSAL:
    return out
  words = out[:, -inputs['tokens'].shape[1] :]  # peft gives those of prompts before them
  return words * inputs['mask'][..., None]


def ours(loaded, tuned, theta, name):
  inputs, _ = golden(name)
  out = np.asarray(jax.jit(tuned.apply)(theta, loaded.variables, **inputs))
  return out * inputs['mask'][..., None] if name in CAUSAL else out


def from_the_first(out, name):
  """Outputs of rows without padding in front, which peft counts between prompts and words."""
  inputs, _ = golden(name)
  return out[inputs['mask'][:, 0] == 1]


def trained(name, folder, **config):
  """Makes a folder by peft, with all that is trained moved; returns what it gives, opened again.

  The file has the patterns sorted, so that another one may come first than in training.
  """
  given = {'r': 2, 'lora_alpha': 4, 'target_modules': 'all-linear', **config}
  return trained_by(peft.LoraConfig(**given), name, folder)


def trained_by(config, name, folder):
  torch.manual_seed(0)
  model = peft.get_peft_model(base_of(name), config)
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.requires_grad:
        parameter += 0.05 * torch.randn_like(parameter)
  model.save_pretrained(folder)
  return reopened(name, folder)


def put_on(loaded, folder, name, **options):
  inputs, _ = golden(name)
  method, theta = jpeft.load_adapter(folder, loaded, **options)
  tuned = jpeft.attach(loaded.model, method, loaded.variables, **inputs)
  assert jax.tree.map(np.shape, theta) == jax.tree.map(np.shape, tuned.shapes)
  return tuned, theta


def reopened(name, folder):
  return their(peft.PeftModel.from_pretrained(base_of(name), folder), name)


def filled(kind, name):
  """The fields of a kind with the names of a model in them."""
  adapted, saved = PARTS[name]
  text = json.dumps(KINDS[kind]).replace('{q}', adapted).replace('{saved}', saved)
  return json.loads(text)


STARTS = ('pissa', 'olora')


def exact(kind, name, folder):
  """What a folder of PiSSA or OLoRA means: the matrices taken apart, and all else, in float64."""
  config = json.loads((folder / 'adapter_config.json').read_text())
  rank, scale = config['r'], config['lora_alpha'] / config['r']
  tensors = load_file(folder / 'adapter_model.safetensors')
  model = base_of(name).double()
  for key, a in tensors.items():
    if not key.endswith('.lora_A.weight'):
      continue
    b = tensors[key.replace('lora_A', 'lora_B')]
    weight = model.get_submodule(key.split('.', 2)[2].removesuffix('.lora_A.weight')).weight
    if kind == 'pissa':
      u, s, v = np.linalg.svd(weight.detach().numpy())
      start = (u[:, :rank] * s[:rank]) @ v[:rank]
    else:
      q, r = np.linalg.qr(weight.detach().numpy())
      start = scale * q[:, :rank] @ r[:rank]
    with torch.no_grad():
      weight += torch.tensor(scale * b.astype(np.float64) @ a - start)
  return their(model, name)


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('kind', KINDS)
def test_folders_compute_the_same_both_ways(request, kind, name, tmp_path):
  want = trained(name, tmp_path / 'peft', **filled(kind, name))
  loaded = models.load(GOLDEN / name, scan=kind in ('patterns', 'dora'))
  tuned, theta = put_on(loaded, tmp_path / 'peft', name)
  got = ours(loaded, tuned, theta, name)
  jpeft.save_adapter(tmp_path / 'ours', loaded, theta, tuned=tuned)
  again = reopened(name, tmp_path / 'ours')
  if kind in STARTS:
    # peft takes matrices apart in float32 and is itself off what its folder means. What is read
    # here, and the folder written here, which is plain LoRA, lose nothing.
    meant = exact(kind, name, tmp_path / 'peft')
    close(got, meant, 1e-6)
    close(again, meant, 1e-6)
  else:
    close(again, want, 1e-6)
  if (kind, name) == ('pissa', 't5'):
    reason = 'peft is 1.08e-5 off what its folder means, on some machines'
    request.applymarker(pytest.mark.xfail(strict=False, reason=reason))
  close(got, want, 1e-5)


@pytest.mark.parametrize('name', MODELS)
def test_chained_adapters_of_other_alphas_compute_the_same_there(name, tmp_path):
  inputs, _ = golden(name)
  loaded = models.load(GOLDEN / name, scan=True)
  parts = [jpeft.lora(2, 4, '{q}'), jpeft.lora(3, 1, '{v}|{o}', rslora=True, name='other')]
  if name not in ('t5', 'llama', 'qwen2'):
    parts.append(jpeft.tune('{head}'))
  method = jpeft.chain(*parts)
  tuned = jpeft.attach(loaded.model, method, loaded.variables, **inputs)
  theta = noisy(tuned.init(jax.random.key(0), loaded.variables))
  jpeft.save_adapter(tmp_path, loaded, theta, tuned=tuned)
  want = ours(loaded, tuned, theta, name)
  close(reopened(name, tmp_path), want, 1e-5)
  again, kept = put_on(loaded, tmp_path, name)
  close(ours(loaded, again, kept, name), want, 1e-6)


@pytest.mark.parametrize('name', ('qwen2', 'qwen3'))
@pytest.mark.parametrize(
  'config',
  (
    {'target_modules': ['embed_tokens', 'q_proj'], 'rank_pattern': {'q_proj': 3}},
    {'target_modules': ['lm_head']},
    {'target_modules': ['q_proj'], 'modules_to_save': ['embed_tokens']},
  ),
)
def test_tables_that_are_the_head_stay_so(config, name, tmp_path):
  want = trained(name, tmp_path / 'peft', ensure_weight_tying=True, **config)
  loaded = models.load(GOLDEN / name)
  tuned, theta = put_on(loaded, tmp_path / 'peft', name)
  close(ours(loaded, tuned, theta, name), want, 1e-5)
  jpeft.save_adapter(tmp_path / 'ours', loaded, theta, tuned=tuned)
  close(reopened(name, tmp_path / 'ours'), want, 1e-6)


@pytest.mark.parametrize(
  'config',
  (
    {'target_modules': ['embed_tokens']},
    {'target_modules': ['embed_tokens'], 'use_dora': True},
    {'target_modules': ['lm_head']},
    {'target_modules': ['embed_tokens', 'lm_head']},
    {'target_modules': ['q_proj'], 'modules_to_save': ['embed_tokens']},
    {'target_modules': ['q_proj'], 'modules_to_save': ['embed_tokens', 'lm_head']},
    {'target_modules': ['embed_tokens'], 'use_dora': True, 'ensure_weight_tying': True},
  ),
)
def test_tables_that_part_from_the_head_need_a_head_of_its_own(config, tmp_path):
  want = trained('qwen3', tmp_path / 'peft', **config)
  loaded = models.load(GOLDEN / 'qwen3')
  with pytest.raises(ValueError, match='the head of this backbone is its word table, .*untied'):
    jpeft.load_adapter(tmp_path / 'peft', loaded)
  loaded = models.untied(loaded)
  tuned, theta = put_on(loaded, tmp_path / 'peft', 'qwen3')
  close(ours(loaded, tuned, theta, 'qwen3'), want, 1e-5)
  jpeft.save_adapter(tmp_path / 'ours', loaded, theta, tuned=tuned)
  close(reopened('qwen3', tmp_path / 'ours'), want, 1e-6)


def test_a_table_that_t5_does_not_read_is_told(tmp_path):
  loaded = models.load(GOLDEN / 't5')
  trained('t5', tmp_path, target_modules=['shared'])
  with pytest.raises(ValueError, match="'shared' of T5 is read by no layer"):
    jpeft.load_adapter(tmp_path, loaded)


@pytest.mark.parametrize('name', ('bert', 'roberta'))
@pytest.mark.parametrize('targets', ('{head}', '{head}|pooler'))
@pytest.mark.parametrize('adapted', ('{q}', '{linear}'))
def test_classifiers_open_in_peft(adapted, targets, name, tmp_path):
  inputs, _ = golden(name)
  loaded = models.load(GOLDEN / name)
  method = jpeft.chain(jpeft.lora(2, 4, adapted), jpeft.tune(targets))
  if adapted == '{linear}':
    method = jpeft.chain(jpeft.lora(2, 4, r'(?!head|pooler){linear}'), jpeft.tune(targets))
  tuned = jpeft.attach(loaded.model, method, loaded.variables, **inputs)
  theta = noisy(tuned.init(jax.random.key(0), loaded.variables))
  jpeft.save_adapter(tmp_path, loaded, theta, tuned=tuned)
  assert json.loads((tmp_path / 'adapter_config.json').read_text())['task_type'] == 'SEQ_CLS'
  close(reopened(name, tmp_path), ours(loaded, tuned, theta, name), 1e-5)


def test_a_pooler_that_is_adapted_beside_a_trained_head_opens_in_peft(tmp_path):
  inputs, _ = golden('roberta')
  loaded = models.load(GOLDEN / 'roberta')
  method = jpeft.chain(jpeft.lora(2, 4, 'pooler|{q}'), jpeft.tune('head'))
  tuned = jpeft.attach(loaded.model, method, loaded.variables, **inputs)
  theta = noisy(tuned.init(jax.random.key(0), loaded.variables))
  jpeft.save_adapter(tmp_path, loaded, theta, tuned=tuned)
  close(reopened('roberta', tmp_path), ours(loaded, tuned, theta, 'roberta'), 1e-5)


SCALED = {
  'bert': ('key', 'output.dense'),
  'roberta': ('key', 'output.dense'),
  'deberta': ('key_proj', 'output.dense'),
  'vit': ('k_proj', 'mlp.fc2'),
  'dinov2': ('k_proj', 'mlp.fc2'),
  'beit': ('k_proj', 'mlp.fc2'),
  't5': ('k', 'wo'),
  'llama': ('k_proj', 'down_proj'),
  'qwen2': ('k_proj', 'down_proj'),
}
NORMS = {
  'bert': 'LayerNorm',
  'roberta': 'LayerNorm',
  'deberta': 'LayerNorm',
  'vit': 'layernorm_before',
  'dinov2': 'norm1',
  'beit': 'layernorm_before',
  't5': 'layer_norm',
  'llama': 'input_layernorm',
  'qwen2': 'norm',
}


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('kind', ('ia3', 'norms'))
def test_scales_and_norms_compute_the_same_both_ways(kind, name, tmp_path):
  outputs, inputs = SCALED[name]
  config = peft.LNTuningConfig(target_modules=[NORMS[name]])
  if kind == 'ia3':
    config = peft.IA3Config(target_modules=[outputs, inputs], feedforward_modules=[inputs])
  want = trained_by(config, name, tmp_path / 'peft')
  loaded = models.load(GOLDEN / name, scan=True)
  tuned, theta = put_on(loaded, tmp_path / 'peft', name)
  close(ours(loaded, tuned, theta, name), want, 1e-5)
  jpeft.save_adapter(tmp_path / 'ours', loaded, theta, tuned=tuned)
  close(reopened(name, tmp_path / 'ours'), want, 1e-6)


@pytest.mark.parametrize('name', MODELS)
def test_vera_computes_the_same_both_ways(name, tmp_path):
  config = peft.VeraConfig(r=3, target_modules=[PARTS[name][0], SCALED[name][1]])
  want = trained_by(config, name, tmp_path / 'peft')
  loaded = models.load(GOLDEN / name, scan=True)
  tuned, theta = put_on(loaded, tmp_path / 'peft', name)
  close(ours(loaded, tuned, theta, name), want, 1e-5)
  jpeft.save_adapter(tmp_path / 'ours', loaded, theta, tuned=tuned)
  close(reopened(name, tmp_path / 'ours'), want, 1e-6)


@pytest.mark.parametrize('name', MODELS)
def test_vera_around_pairs_of_its_own_opens_in_peft(name, tmp_path):
  inputs, _ = golden(name)
  loaded = models.load(GOLDEN / name, scan=True)
  method = jpeft.chain(jpeft.vera(3, '{q}|{fc2}'), jpeft.vera(2, '{fc1}', seed=4, name='other'))
  tuned = jpeft.attach(loaded.model, method, loaded.variables, **inputs)
  theta = noisy(tuned.init(jax.random.key(0), loaded.variables))
  jpeft.save_adapter(tmp_path, loaded, theta, tuned=tuned)
  close(reopened(name, tmp_path), ours(loaded, tuned, theta, name), 1e-5)


# {case: a config by the names of its modules}, of kinds with tensors of their own
KIN = {
  'loha': lambda names: peft.LoHaConfig(r=2, alpha=3, target_modules=names),
  'lokr': lambda names: peft.LoKrConfig(r=2, alpha=3, target_modules=names),
  'hira': lambda names: peft.HiraConfig(r=2, target_modules=names),
  'adalora': lambda names: peft.AdaLoraConfig(
    init_r=3, lora_alpha=5, target_modules=names, total_step=9
  ),
  'oft': lambda names: peft.OFTConfig(oft_block_size=4, target_modules=names),
  'oft_shared': lambda names: peft.OFTConfig(
    r=2, oft_block_size=0, block_share=True, use_cayley_neumann=False, target_modules=names
  ),
  'boft': lambda names: peft.BOFTConfig(boft_block_size=4, target_modules=names),
  'fourierft': lambda names: peft.FourierFTConfig(
    n_frequency=9, target_modules=names, random_loc_seed=5
  ),
  'vblora': lambda names: peft.VBLoRAConfig(
    r=2, num_vectors=7, vector_length=4, topk=3, target_modules=names
  ),
  'vblora_topk': lambda names: peft.VBLoRAConfig(
    r=2,
    num_vectors=7,
    vector_length=4,
    topk=2,
    save_only_topk_weights=True,
    target_modules=names,
  ),
  'randlora': lambda names: peft.RandLoraConfig(r=3, randlora_alpha=2, target_modules=names),
  'randlora_sparse': lambda names: peft.RandLoraConfig(
    r=4, randlora_alpha=2, sparse=True, projection_prng_key=3, target_modules=names
  ),
  'lokr_of_both': lambda names: peft.LoKrConfig(
    r=1, alpha=3, target_modules=names, decompose_both=True, decompose_factor=4
  ),
}


@pytest.mark.parametrize('name', ('bert', 'vit', 'llama', 't5'))
@pytest.mark.parametrize('case', KIN)
def test_kinds_with_tensors_of_their_own_compute_the_same_both_ways(case, name, tmp_path):
  config = KIN[case]([PARTS[name][0], SCALED[name][1]])
  want = trained_by(config, name, tmp_path / 'peft')
  loaded = models.load(GOLDEN / name, scan=True)
  tuned, theta = put_on(loaded, tmp_path / 'peft', name)
  close(ours(loaded, tuned, theta, name), want, 1e-5)
  jpeft.save_adapter(tmp_path / 'ours', loaded, theta, tuned=tuned)
  close(reopened(name, tmp_path / 'ours'), want, 1e-6)


@pytest.mark.parametrize('name', ('bert', 'vit', 'llama', 't5'))
def test_bases_of_our_own_open_in_peft(name, tmp_path):
  inputs, _ = golden(name)
  loaded = models.load(GOLDEN / name, scan=True)
  method = jpeft.randlora(3, 2, '{q}|{fc2}', seed=4)
  tuned = jpeft.attach(loaded.model, method, loaded.variables, **inputs)
  theta = noisy(tuned.init(jax.random.key(0), loaded.variables))
  jpeft.save_adapter(tmp_path, loaded, theta, tuned=tuned)
  close(reopened(name, tmp_path), ours(loaded, tuned, theta, name), 1e-5)


TABLES = {
  **dict.fromkeys(('bert', 'roberta', 'deberta'), 'word_embeddings'),
  't5': 'shared',
}
TEXT = ('bert', 'roberta', 'deberta', 't5', 'llama', 'qwen2')


# Of the DeBERTa alone: beside LoRA its outputs come out too small to compare.
@pytest.mark.parametrize(
  'name,beside',
  [
    (name, beside)
    for name in TEXT
    for beside in (False, True)
    if (name, beside) != ('deberta', True)
  ],
)
def test_rows_of_a_table_compute_the_same_both_ways(name, beside, tmp_path):
  rows = [7, 1, 5]
  if beside:
    adapted, _ = PARTS[name]
    config = peft.LoraConfig(r=2, target_modules=[adapted], trainable_token_indices=rows)
  else:
    table = TABLES.get(name, 'embed_tokens')
    config = peft.TrainableTokensConfig(token_indices=rows, target_modules=[table])
  want = trained_by(config, name, tmp_path / 'peft')
  loaded = models.load(GOLDEN / name)
  tuned, theta = put_on(loaded, tmp_path / 'peft', name)
  close(ours(loaded, tuned, theta, name), want, 1e-5)
  jpeft.save_adapter(tmp_path / 'ours', loaded, theta, tuned=tuned)
  close(reopened(name, tmp_path / 'ours'), want, 1e-6)


TASKS = {'bert': 'SEQ_CLS', 'roberta': 'SEQ_CLS', 't5': 'SEQ_2_SEQ_LM'}
DECODERS = ('llama', 'qwen2')
PROMPTED = tuple(name for name in TEXT if name != 'deberta')  # which jpeft refuses by name
PROMPTS = {
  'prompts': (lambda **kw: peft.PromptTuningConfig(**kw), PROMPTED),
  'p_tuning': (lambda **kw: peft.PromptEncoderConfig(encoder_hidden_size=6, **kw), PROMPTED),
  'prefix': (lambda **kw: peft.PrefixTuningConfig(**kw), DECODERS),
  'projected': (
    lambda **kw: peft.PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=6, **kw),
    DECODERS,
  ),
}


@pytest.mark.parametrize(
  'kind,name', [(kind, name) for kind in PROMPTS for name in PROMPTS[kind][1]]
)
def test_prompts_and_prefixes_compute_the_same_both_ways(kind, name, tmp_path):
  config, _ = PROMPTS[kind]
  want = trained_by(
    config(num_virtual_tokens=3, task_type=TASKS.get(name, 'CAUSAL_LM')), name, tmp_path / 'peft'
  )
  loaded = models.load(GOLDEN / name, scan=True)
  tuned, theta = put_on(loaded, tmp_path / 'peft', name)
  want = from_the_first(want, name)
  assert len(want) >= 2
  close(from_the_first(ours(loaded, tuned, theta, name), name), want, 1e-5)
  jpeft.save_adapter(tmp_path / 'ours', loaded, theta, tuned=tuned)
  close(from_the_first(reopened(name, tmp_path / 'ours'), name), want, 1e-6)


@pytest.mark.parametrize('name', ('bert', 'llama'))
def test_a_bias_of_b_computes_the_same(name, tmp_path):
  adapted, _ = PARTS[name]
  want = trained(name, tmp_path / 'peft', target_modules=[adapted], lora_bias=True)
  loaded = models.load(GOLDEN / name, scan=True)
  tuned, theta = put_on(loaded, tmp_path / 'peft', name)
  close(ours(loaded, tuned, theta, name), want, 1e-5)
  jpeft.save_adapter(tmp_path / 'ours', loaded, theta, tuned=tuned)
  close(reopened(name, tmp_path / 'ours'), want, 1e-6)


def test_the_fields_of_peft_are_known():
  configs = (
    peft.LoraConfig(),
    peft.IA3Config(),
    peft.LNTuningConfig(),
    peft.VeraConfig(),
    peft.LoHaConfig(),
    peft.LoKrConfig(),
    peft.FourierFTConfig(),
    peft.OFTConfig(),
    peft.BOFTConfig(),
    peft.AdaLoraConfig(total_step=9),
    peft.HiraConfig(),
    peft.VBLoRAConfig(),
    peft.RandLoraConfig(),
    peft.TrainableTokensConfig(),
    peft.PromptTuningConfig(),
    peft.PromptEncoderConfig(),
    peft.PrefixTuningConfig(),
  )
  fields = {field for config in configs for field in config.to_dict()} | {'runtime_config'}
  assert fields - set(KNOWN) == set()


# Towers of images without a head: alone, and beside the tower of texts.
TOWERS = (
  ('clip', 'CLIPVisionModel'),
  ('siglip', 'SiglipVisionModel'),
  ('clip', 'CLIPModel'),
)


@pytest.mark.parametrize('name,kind', TOWERS)
@pytest.mark.parametrize('adapter', ('lora', 'norms'))
def test_towers_without_a_head_compute_the_same_both_ways(adapter, name, kind, tmp_path):
  images = golden(name)[0]['images']
  base = tmp_path / 'base'
  getattr(transformers, kind).from_pretrained(GOLDEN / name).save_pretrained(base)

  def feature(model):
    tower = model.base_model.model.vision_model if kind == 'CLIPModel' else model
    with torch.no_grad():
      return tower.eval()(pixel_values=torch.tensor(images.transpose(0, 3, 1, 2))).pooler_output

  def fresh():
    return getattr(transformers, kind).from_pretrained(base).eval()

  where = r'vision_model\..*' if kind == 'CLIPModel' else '.*'
  config = peft.LoraConfig(r=2, target_modules=rf'{where}(q_proj|fc1)')
  if adapter == 'norms':
    config = peft.LNTuningConfig(target_modules=rf'{where}layer_norm1')
  torch.manual_seed(0)
  model = peft.get_peft_model(fresh(), config)
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.requires_grad:
        parameter += 0.05 * torch.randn_like(parameter)
  model.save_pretrained(tmp_path / 'peft')
  want = feature(peft.PeftModel.from_pretrained(fresh(), tmp_path / 'peft')).numpy()

  loaded = models.load(base, head=None)
  method, theta = jpeft.load_adapter(tmp_path / 'peft', loaded)
  tuned = jpeft.attach(loaded.model, method, loaded.variables, images)
  close(np.asarray(tuned.apply(theta, loaded.variables, images)), want, 1e-5)
  jpeft.save_adapter(tmp_path / 'ours', loaded, theta, tuned=tuned)
  close(feature(peft.PeftModel.from_pretrained(fresh(), tmp_path / 'ours')).numpy(), want, 1e-6)
