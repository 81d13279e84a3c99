"""Is a movie review good or bad? A small sentence encoder, any method.

    python -m jpeft.train --config=configs/sentiment.py:lora --workdir=runs/sentiment

MiniLM-L6 on 7,030 sentences of movie reviews (Hutto and Gilbert, 2014), tested on 3,042 others.
"""

from ml_collections import ConfigDict

# Learning rate, epochs and hyperparameters of each method. What never runs the backbone backwards
# runs it once an example, without dropout, and keeps its features (cache).
METHODS = {
  'linear': dict(lr=3e-3, epochs=10, cache=True),
  'lst': dict(
    lr=3e-3,
    epochs=4,
    cache=True,
    reduction=8,
    block='own',
    prune='magnitude',
    merge='add',
    dropout=0.1,
    remat=False,
  ),
  'vqt': dict(lr=3e-2, epochs=4, cache=True),
  'full': dict(lr=1e-4, epochs=1),
  'bitfit': dict(lr=3e-3, epochs=1),
  'lora': dict(lr=2e-3, epochs=1, rank=8, alpha=16, targets='{linear}'),
  'lora_packed': dict(
    name='lora', lr=2e-3, epochs=1, rank=8, alpha=16, targets='{linear}', saved_bits=4
  ),
  # A first phase of 200 batches prunes heads, hidden units and LoRA.
  'light_peft': dict(lr=2e-3, epochs=1, rank=8, alpha=16, updates=200),
  'pissa': dict(name='lora', lr=3e-4, epochs=1, rank=8, alpha=8, init='pissa', targets='{linear}'),
  'pst': dict(lr=1e-4, epochs=2, rank=8, sparsity=0.5, targets='{linear}'),
  'mam': dict(lr=1e-3, epochs=1, tokens=16, bottleneck=16, scale=2.0),
  'vb_lora': dict(lr=1e-2, epochs=1, length=128, vectors=64, targets='{linear}'),
  'lt_sft': dict(lr=1e-3, epochs=1, count=300_000, first_steps=200, first_batch=32),
  'houlsby': dict(lr=1e-3, epochs=1),
}


def get_config(method='lora'):
  chosen = {'lr': 1e-3, 'epochs': 1, **METHODS.get(method, {})}
  config = ConfigDict()
  cache = chosen.pop('cache', False)
  config.model = dict(source='minilm-l6', dropout=0.0 if cache else None)
  config.data = dict(
    name='movie_sentiment',
    batch_size=32,
    eval_batch_size=128,
    max_length=48,
    in_memory=True,
    cache_features=cache,
  )
  config.optimizer = dict(lr=chosen.pop('lr'), weight_decay=0.01, clip_norm=1.0)
  config.schedule = dict(name='linear', warmup_fraction=0.1)
  config.epochs = chosen.pop('epochs')
  config.method = {'name': method, **chosen}
  return config
