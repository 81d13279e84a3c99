"""Makes golden/<library>/<model>_<case>/ with torch, transformers 4.5x, peft and adapters.

Run it as `python tests/export/make_golden.py`, or with the names of folders of peft, which then are
made alone, with a transformers of any age; the folders are committed, no test needs those
packages. golden/VERSIONS says which were used. The base models and the inputs are those of
tests/models/golden. Adapters look trained: every number of them is moved by noise.

Each folder is what the library saved, and logits.npy [B, ..] what it computed.
"""

import json
import shutil
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

HERE = Path(__file__).parent / 'golden'
MODELS = Path(__file__).parents[1] / 'models' / 'golden'
THEIRS = {
  'images': 'pixel_values',
  'tokens': 'input_ids',
  'mask': 'attention_mask',
  'types': 'token_type_ids',
  'decoder_tokens': 'decoder_input_ids',
}
PEFT = {
  'lora': peft.LoraConfig(r=2, target_modules=['query', 'fc1'], modules_to_save=['classifier']),
  'dora': peft.LoraConfig(r=2, target_modules=['value', 'dense'], use_dora=True),
}
SHARED = {
  'bert_vblora': peft.VBLoRAConfig(
    r=2, num_vectors=7, vector_length=4, topk=3, target_modules=['query', 'output.dense']
  ),
  'bert_topk': peft.VBLoRAConfig(
    r=2, num_vectors=7, vector_length=4, save_only_topk_weights=True, target_modules=['query']
  ),
  'bert_randlora': peft.RandLoraConfig(
    r=5, randlora_alpha=2, target_modules=['query', 'output.dense']
  ),
}
PROMPTS = {
  'bert_prompts': peft.PromptTuningConfig(num_virtual_tokens=3, task_type='SEQ_CLS'),
  't5_prompts': peft.PromptTuningConfig(num_virtual_tokens=3, task_type='SEQ_2_SEQ_LM'),
  'llama_prompts': peft.PromptTuningConfig(num_virtual_tokens=3, task_type='CAUSAL_LM'),
  'llama_prefix': peft.PrefixTuningConfig(num_virtual_tokens=3, task_type='CAUSAL_LM'),
}
# {case: (a config of the adapters library, what differs from it)}
BOTTLENECKS = {
  'double': ('double_seq_bn', {}),
  'seq': ('seq_bn', {}),
  'par': ('par_bn', {}),
  'gelu': ('double_seq_bn', {'non_linearity': 'gelu', 'scaling': 'learned'}),
  'tanh': ('seq_bn', {'non_linearity': 'gelu_new', 'scaling': 2.0}),
  'learned': ('par_bn', {'non_linearity': 'tanh', 'scaling': 'learned'}),
}


def base_of(name):
  config = json.loads((MODELS / name / 'config.json').read_text())
  options = {}
  if 'rope_parameters' in config:  # what transformers 4.5x calls otherwise
    rope = dict(config['rope_parameters'])
    options = {'rope_theta': rope.pop('rope_theta'), 'rope_scaling': rope}
  kind = getattr(transformers, config['architectures'][0])
  model = kind.from_pretrained(MODELS / name, **options).eval()
  want = np.load(MODELS / name / 'golden.npz')['logits']
  if name == 'llama':
    want = want * np.load(MODELS / name / 'golden.npz')['mask'][..., None]
  np.testing.assert_allclose(logits(model, name), want, atol=1e-4)
  return model


def moved(model):
  torch.manual_seed(0)
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.requires_grad:
        parameter += 0.1 * torch.randn_like(parameter)


def logits(model, name):
  held = np.load(MODELS / name / 'golden.npz')
  inputs = {}
  for ours, theirs in THEIRS.items():
    if ours in held:
      x = held[ours]
      inputs[theirs] = torch.tensor(x.transpose(0, 3, 1, 2) if x.ndim == 4 else x.astype('int64'))
  with torch.no_grad():
    out = model.eval()(**inputs).logits.numpy()
  if name == 'llama':
    out = out[:, -held['tokens'].shape[1] :] * held['mask'][..., None]
  return out.astype(np.float32)


def write(folder, model, name, save):
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  save(folder)
  for file in folder.iterdir():
    if file.suffix not in ('.json', '.safetensors'):
      file.unlink()
  for file in folder.glob('*.json'):  # no path of this machine
    told = json.loads(file.read_text())
    for key in ('model_name', 'base_model_name_or_path'):
      if key in told:
        told[key] = f'tiny-{name}'
    file.write_text(json.dumps(told, indent=2, sort_keys=True) + '\n')
  np.save(folder / 'logits.npy', logits(model, name))


def of_peft(only=()):
  cases = {f'{name}_{case}': config for name in ('vit', 'dinov2') for case, config in PEFT.items()}
  for case, config in {**cases, **PROMPTS, **SHARED}.items():
    if only and case not in only:
      continue
    name = case.partition('_')[0]
    model = peft.get_peft_model(base_of(name), config)
    moved(model)
    write(HERE / 'peft' / case, model, name, model.save_pretrained)


def of_adapters():
  import adapters  # it wants a transformers 4.5x

  for name in ('bert', 'roberta', 'vit', 't5', 'llama'):
    for case, (kind, options) in BOTTLENECKS.items():
      if options and name not in ('bert', 'vit'):
        continue
      model = base_of(name)
      adapters.init(model)
      model.add_adapter(
        'task', config=adapters.AdapterConfig.load(kind, reduction_factor=4, **options)
      )
      model.train_adapter('task')
      with_head = name in ('bert', 'roberta', 'vit')
      if not with_head:
        for parameter in model.get_output_embeddings().parameters():
          parameter.requires_grad = False
      moved(model)

      def save(folder, model=model, with_head=with_head):
        model.save_adapter(str(folder), 'task', with_head=with_head, use_safetensors=True)

      write(HERE / 'adapters' / f'{name}_{case}', model, name, save)


if __name__ == '__main__':
  of_peft(sys.argv[1:])
  if sys.argv[1:]:
    sys.exit()
  of_adapters()
  versions = [f'python {sys.version.split()[0]}']
  versions += [
    f'{name} {metadata.version(name)}' for name in ('torch', 'transformers', 'peft', 'adapters')
  ]
  (HERE / 'VERSIONS').write_text('\n'.join(versions) + '\n')
