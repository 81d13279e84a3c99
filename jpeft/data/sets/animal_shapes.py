"""Outlines of animals out of animal-mnist."""

import gzip
import pickletools
import zipfile
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from jpeft.archives import Archive

from ..source import divided
from .builder import Example, PackagedBuilder, png

FOLDER = 'animal_mnist/data/Animal_MNIST/'
ANIMALS = [
  *('bear', 'bird', 'cat', 'cow', 'dog'),
  *('elephant', 'giraffe', 'horse', 'sheep', 'zebra'),
]
SIDE = 28  # pixels


class AnimalShapes(PackagedBuilder):
  """Animals cut out of photographs [28, 28, 1], from animal-mnist 0.4 (MIT), in 10 classes.

  White on black; zebras show their stripes. 10,000 images, 1,000 a class, of which 9,716 differ:
  'train' has those whose MD5 of the pixels modulo 10 is below 8, in the order of that MD5, so that
  images which are equal are in one split; 'test' has the others.
  """

  ARCHIVE = Archive(
    'animal-mnist',
    '0.4',
    'animal_mnist-0.4-py3-none-any.whl',
    'aeebf3d9de4552d6fd2d5701424e1a5b9020f8e5115d68df9db252f2f53ce2ce',
  )
  FEATURES = {
    'image': tfds.features.Image(shape=(SIDE, SIDE, 1)),
    'label': tfds.features.ClassLabel(names=ANIMALS),
  }
  SUPERVISED = ('image', 'label')

  def examples(self, archive: Path) -> dict[str, list[Example]]:
    with zipfile.ZipFile(archive) as wheel:
      pixels = _bytes(wheel.read(f'{FOLDER}animal_data_version_3.gz'))
      numbers = _bytes(wheel.read(f'{FOLDER}animal_label_version_3.gz'))
    labels = np.frombuffer(numbers, '<i8').tolist()
    images = np.frombuffer(pixels, np.uint8).reshape(len(labels), SIDE, SIDE)
    splits = {}
    for split, order in divided([image.tobytes() for image in images]).items():
      splits[split] = [
        {'image': png(Image.fromarray(images[row])), 'label': labels[row]} for row in order
      ]
    return splits


def _bytes(file: bytes) -> bytes:
  """The content of an array in a zipped pickle, whose program is read and not run."""
  found = [content for _, content, _ in pickletools.genops(gzip.decompress(file))]
  return max((part for part in found if isinstance(part, bytes)), key=len)
