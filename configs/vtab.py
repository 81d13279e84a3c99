"""A task of VTAB-1k as the tables of vision papers have it: ViT-B/16 of ImageNet-21k, any method.

    python -m jpeft.train --config=configs/vtab.py:adaptformer --workdir=runs/cifar \
      --config.data.name=vtab:vtab-1k/cifar --config.model.source=ViT-B_16.npz

AdamW at 1e-3 with weight decay 1e-4, batches of 64, 100 epochs of which 10 are warm-up, images
squashed to 224 pixels and brought to ImageNet's colours, no augmentation. The argument is METHOD or
METHOD,PROTOCOL, and the protocol says where an accuracy comes from:

    test      trained on the 1,000 images, tested once, at the end; if left out
    choose    trained on 800, scored on the other 200: for rates and scales, never reads the test
    best      as test, and tested every 10 epochs: `best` of the report is what much of the
              published code prints, which is chosen on the test images

`python -m jpeft.bench.vtab RUN RUN ...` prints the row of a method with its means.
"""

from ml_collections import ConfigDict

# Learning rate and hyperparameters of each method, as in its published row.
METHODS = {
  'linear': dict(lr=1e-3),
  'full': dict(lr=1e-4),
  'bitfit': dict(lr=1e-3),
  'lora': dict(lr=1e-3, rank=8, alpha=8),
  'pissa': dict(name='lora', lr=3e-4, rank=8, alpha=8, init='pissa'),
  'adaptformer': dict(lr=1e-3, bottleneck=8, scale=0.1),
  'ssf': dict(lr=1e-3),
  'vpt_deep': dict(lr=1e-3, tokens=50),
  'lst': dict(lr=1e-3),
  'vqt': dict(lr=3e-2),
}
# {protocol: (split to train on, split to score, epochs between scores)}
PROTOCOLS = {
  'test': ('train800val200', 'test', 100),
  'choose': ('train800', 'val200', 10),
  'best': ('train800val200', 'test', 10),
}


def get_config(argument='adaptformer'):
  method, _, protocol = argument.partition(',')
  protocol = protocol or 'test'
  if protocol not in PROTOCOLS:
    raise ValueError(f'no protocol is called {protocol!r}; there is {", ".join(PROTOCOLS)}')
  train, test, every = PROTOCOLS[protocol]
  chosen = {'lr': 1e-3, **METHODS.get(method, {})}
  batch = 64
  updates = (800 if protocol == 'choose' else 1000) // batch  # an epoch
  config = ConfigDict()
  config.model = dict(source='ViT-B_16.npz', image_size=224)
  config.data = dict(
    name='vtab:vtab-1k/cifar',
    train=train,
    test=test,
    batch_size=batch,
    augment='vtab',
    pixels='imagenet',
  )
  config.optimizer = dict(lr=chosen.pop('lr'), weight_decay=1e-4)
  config.schedule = dict(name='cosine', warmup_fraction=0.1)
  config.epochs = 100
  config.eval = dict(every=every * updates)
  config.method = {'name': method, **chosen}
  return config
