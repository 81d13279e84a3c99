"""Which group does an emoji belong to? A small pretrained ViT and 1,324 drawings, any method.

    python -m jpeft.train --config=configs/emoji.py:lst --workdir=runs/emoji

DINOv2-S/14-architecture weights at 112 pixels on 1,324 emoji of 9 Unicode groups, tested on 582
others: few examples a class, as in VTAB-1k. npm fetches the drawings.
"""

import pathlib
import runpy

digits = runpy.run_path(str(pathlib.Path(__file__).with_name('quickstart.py')))
RATES = {'full': 3e-5}  # where that of the digits does not serve


def get_config(method='lst'):
  config = digits['get_config'](method)
  config.model.image_size = 112
  config.data.update(
    name='emoji_groups', train='train', test='test', batch_size=32, eval_batch_size=97
  )
  config.optimizer.lr = RATES.get(method, config.optimizer.lr)
  config.baseline = None
  return config
