"""The mean and deviation of images that a config asks for."""

import types

import numpy as np
import pytest

from jpeft import config as config_lib
from jpeft import tasks, training

GREY = np.full((8, 9, 3), 128, np.uint8)
TEXTS = types.SimpleNamespace(preprocess=None)


@pytest.mark.parametrize(
  ('pixels', 'grey'), [('imagenet', 0.0741), ('half', 0.0039), ('none', 0.5020)]
)
def test_images_are_brought_to_what_the_config_asks_for(config_file, pixels, grey):
  config = config_lib.load(f'{config_file}:linear', {'data.pixels': pixels})
  pretrained, _ = training.build(config, 2)
  for is_training in (True, False):
    transform = tasks.modality_of(pretrained).transform(config, pretrained, is_training)
    image = transform({'image': GREY}, None)['image']
    assert image[0, 0, 0] == pytest.approx(grey, abs=1e-4)
    assert pretrained.preprocess['image_size'] == image.shape[0]


def test_texts_have_no_pixels():
  settings = {'model': {'source': 'somewhere'}, 'data': {'name': 'mine', 'pixels': 'half'}}
  config = config_lib.complete({**settings, 'method': {'name': 'linear'}, 'steps': 1})
  with pytest.raises(ValueError, match="config.data.pixels='half' is of images, and this model"):
    training.build(config, 2, load=lambda source, **fields: TEXTS)
