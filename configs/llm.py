"""How is a word spoken? A small language model writes its phonemes; any method, 4-bit backbones.

    python -m jpeft.train --config=configs/llm.py:qlora --workdir=runs/llm-qlora
    python -m jpeft.generate --run runs/llm-qlora --prompt 'quantize:' 'side:'

SmolLM2-135M-Instruct on 10,000 words of the CMU pronouncing dictionary, about 9 in a row of 128
tokens; the perplexity of the phonemes of 400 held-out words, and 64 of them written out. The
untuned model is scored too.

    python -m jpeft.train --config=configs/llm.py:dpo --config.data.name=preferences:FOLDER \
      --config.model.source=MODEL --workdir=runs/dpo

learns preferences of your own by DPO instead: see docs/tasks.md.
"""

from ml_collections import ConfigDict

# Only the first of several words in a row would see tokens of a method: each has a row of its own.
APART = dict(pack=False, batch_size=8, eval_batch_size=16, max_length=32)

# Learning rate and hyperparameters of each method. Side blocks of the decoder's own class keep
# their keys and values when they write.
METHODS = {
  'lora': dict(lr=2e-3, rank=8, alpha=16, targets='{linear}'),
  'loraprune': dict(lr=2e-3, rank=8, alpha=16, sparsity=0.2),
  'pissa': dict(name='lora', lr=3e-4, rank=8, alpha=8, init='pissa', targets='{linear}'),
  'qlora': dict(lr=2e-3, rank=8, alpha=16),
  # Vectors are switched while the run is young; more candidates would stay unused.
  'switchlora': dict(lr=5e-3, rank=8, candidates=64),
  # A third of the heads and hidden units of all layers but the first four and the last two go.
  'loram': dict(lr=2e-3, rank=8, alpha=16, ratio=0.34),
  'qst': dict(lr=5e-3, reduction=4, alpha_init=0.9, normalize=True),
  'lst': dict(lr=5e-3, reduction=4, block='own', merge='add', normalize=True),
  'peqa': dict(lr=1e-4),
  'paca': dict(lr=1e-3, rank=64, alpha=64),
  'qpaca': dict(name='paca', lr=1e-3, rank=64, alpha=64, quantize='nf4_double'),
  'lamda': dict(lr=1e-3, rank=64, alpha=64),
  'prompt_tuning': dict(lr=3e-1, tokens=20, data=APART),
  # The prompt learns fast, the low-rank change of the words slowly.
  'dept': dict(lr=3e-1, tokens=20, rank=16, length=32, groups=(('.*/(a|b)', 1e-2),), data=APART),
  'vb_lora': dict(lr=1e-2, length=64, vectors=90, targets='{linear}'),
  'norm': dict(lr=1e-2),
  'lamda_pp': dict(lr=2e-3, rank=16),
  'full': dict(lr=1e-4),
  # Preferences, of preferences:PATH or hf:NAME; the rates of published runs with LoRA.
  'dpo': dict(name='lora', lr=5e-5, rank=16, alpha=32, targets='{linear}', task='preferences'),
  'galore': dict(
    name='full', lr=4e-4, update=dict(name='galore', rank=128, every=50, basis='sketch')
  ),
}


def get_config(method='qlora'):
  chosen = {'lr': 2e-3, **METHODS.get(method, {})}
  config = ConfigDict()
  config.task = chosen.pop('task', 'language')
  config.model = dict(source='smollm2-135m', scan=True, quantize=chosen.pop('quantize', None))
  config.data = dict(
    name='phonemes',
    train='train[:10000]',
    test='test[:400]',
    batch_size=2,
    eval_batch_size=4,
    max_length=128,
  )
  config.data.update(chosen.pop('data', {}))
  config.optimizer = dict(
    lr=chosen.pop('lr'),
    clip_norm=1.0,
    groups=chosen.pop('groups', ()),
    **chosen.pop('update', {}),
  )
  config.schedule = dict(name='cosine', warmup_fraction=0.05)
  config.steps = 300
  config.method = {'name': method, **chosen}
  config.eval = dict(metric='perplexity', generate=64)
  if config.task == 'preferences':
    config.data = dict(
      name='preferences:preferences', batch_size=16, eval_batch_size=16, max_length=512, chat=True
    )
    config.optimizer.accumulate = 4
    config.schedule.warmup_fraction = 0.1
    config.eval = dict()
    del config.steps
    config.epochs = 1
  return config
