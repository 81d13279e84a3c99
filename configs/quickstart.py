"""A thousand digits, a small pretrained ViT, any method.

    python -m jpeft.train --config=configs/quickstart.py --workdir=runs/quickstart
    python -m jpeft.train --config=configs/quickstart.py:lora --workdir=runs/lora

DINOv2-S/14-architecture weights at 56 pixels on 1,000 MNIST digits, tested on 1,000 others. The
first command trains ladder side-tuning and, beside it, a linear probe, and prints both as a table:
about three minutes of training on two CPU cores.
"""

from ml_collections import ConfigDict

# Learning rate, epochs and hyperparameters of each method. What never runs the backbone backwards
# runs it once an example and keeps its features (cache), so it affords many epochs.
METHODS = {
  'linear': dict(lr=1e-2, epochs=40, cache=True),
  'lst': dict(
    lr=5e-3,
    epochs=24,
    cache=True,
    reduction=8,
    block='attention',
    gate=None,
    merge='add',
    normalize=True,
    remat=False,
  ),
  'unipt': dict(lr=3e-3, epochs=24, cache=True),
  'vqt': dict(lr=3e-2, epochs=24, cache=True),
  'sherl': dict(lr=3e-3, epochs=24, cache=True),
  'full': dict(lr=1e-4, epochs=4),
  'bitfit': dict(lr=5e-3, epochs=4),
  'norm': dict(lr=5e-3, epochs=4),
  'lora': dict(lr=3e-3, epochs=4, rank=8, alpha=16),
  'lora_packed': dict(name='lora', lr=3e-3, epochs=4, rank=8, alpha=16, saved_bits=4),
  'pissa': dict(name='lora', lr=3e-4, epochs=4, rank=8, alpha=8, init='pissa'),
  'dora': dict(lr=3e-3, epochs=4, rank=8, alpha=16),
  'ssf': dict(lr=5e-3, epochs=4),
  'adaptformer': dict(lr=3e-3, epochs=4, bottleneck=16, scale=1.0),
  'vpt_deep': dict(lr=1e-2, epochs=4, tokens=10),
  'e2vpt': dict(lr=1e-2, epochs=4, tokens=10, kv_tokens=5),
  'snell': dict(lr=3e-2, epochs=4),
  'snella': dict(lr=1e-3, epochs=4, every=1, rounds=60),
  'bi_adaptformer': dict(lr=3e-3, epochs=4, bottleneck=16, scale=1.0),
  'bi_lora': dict(lr=3e-3, epochs=4, rank=8, scale=1.0),
  'sct': dict(lr=3e-3, epochs=4, channels=48),
  'spt': dict(lr=3e-3, epochs=4, budget=155_000),
  'dyt': dict(lr=3e-3, epochs=4, bottleneck=16, scale=1.0),
  'ia3': dict(lr=3e-2, epochs=4),
  'prefix': dict(lr=1e-2, epochs=4),
  'velora': dict(lr=3e-4, epochs=4),
}


def get_config(method='lst'):
  chosen = {'lr': 3e-3, 'epochs': 4, **METHODS.get(method, {})}
  config = ConfigDict()
  config.model = dict(source='dinov2-s14', image_size=56)
  config.data = dict(
    name='mnist5k',
    train='train[:1000]',
    test='test[:1000]',
    batch_size=50,
    eval_batch_size=100,
    in_memory=True,
    cache_features=chosen.pop('cache', False),
  )
  config.optimizer = dict(lr=chosen.pop('lr'), weight_decay=0.1, clip_norm=1.0)
  config.schedule = dict(name='cosine', warmup_fraction=0.1)
  config.epochs = chosen.pop('epochs')
  config.method = {'name': method, **chosen}
  config.baseline = 'linear' if method == 'lst' else None
  return config
