"""Which group does an emoji belong to? A small pretrained ViT and 1,324 drawings, any method.

    python -m jpeft.train --config=configs/emoji.py:lst --workdir=runs/emoji

DINOv2-S/14-architecture weights at 112 pixels on 1,324 emoji of 9 Unicode groups, tested on 582 others: few
examples a class, as in VTAB-1k. npm fetches the drawings.
"""

from ml_collections import ConfigDict

# Learning rate, epochs and hyperparameters of each method. What never runs the backbone backwards runs it once an
# example and keeps its features (cache), so it affords many epochs.
METHODS = {
  'linear': dict(lr=1e-2, epochs=40, cache=True),
  'lst': dict(lr=5e-3, epochs=24, cache=True, reduction=8, block='attention', gate=None, merge='add', normalize=True,
              remat=False),
  'full': dict(lr=3e-5),
  'bitfit': dict(lr=5e-3),
  'norm': dict(lr=5e-3),
  'lora': dict(lr=3e-3, rank=8, alpha=16),
  'lora_packed': dict(name='lora', lr=3e-3, rank=8, alpha=16, saved_bits=4),
  'pissa': dict(name='lora', lr=3e-4, rank=8, alpha=8, init='pissa'),
  'dora': dict(lr=3e-3, rank=8, alpha=16),
  'ssf': dict(lr=5e-3),
  'adaptformer': dict(lr=3e-3, bottleneck=16, scale=1.0),
  'vpt_deep': dict(lr=1e-2, tokens=10),
}


def get_config(method='lst'):
  chosen = {'lr': 3e-3, 'epochs': 4, **METHODS.get(method, {})}
  config = ConfigDict()
  config.model = dict(source='dinov2-s14', image_size=112)
  config.data = dict(name='emoji_groups', batch_size=32, eval_batch_size=97, in_memory=True,
                     cache_features=chosen.pop('cache', False))
  config.optimizer = dict(lr=chosen.pop('lr'), weight_decay=0.1, clip_norm=1.0)
  config.schedule = dict(name='cosine', warmup_fraction=0.1)
  config.epochs = chosen.pop('epochs')
  config.method = {'name': method, **chosen}
  config.eval = dict(every=240)
  return config
