"""What the packaged data sets share: examples out of an archive, in an order of their own."""

import abc
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from PIL import Image

from jpeft import archives

from ..source import Example


class PackagedBuilder(tfds.core.GeneratorBasedBuilder):
  """A TFDS builder whose examples are in the archive of a package.

  A data set gives the class attributes, `examples`, and a docstring, which becomes its description.

  Attributes:
    ARCHIVE: the archive and its hash.
    FEATURES: {part of an example: its TFDS feature}.
    SUPERVISED: names of the input and of the label; None where examples are texts to write.
    unit: name of what the blanks in a completion separate.
  """

  VERSION = tfds.core.Version('1.0.0')
  ARCHIVE: archives.Archive
  FEATURES: dict[str, Any]
  SUPERVISED: tuple[str, str] | None = None
  unit = 'word'

  @abc.abstractmethod
  def examples(self, archive: Path) -> dict[str, list[Example]]:
    """{split: its examples in their order}, read from the archive."""

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(self.FEATURES),
      description=self.__doc__,
      supervised_keys=self.SUPERVISED,
      disable_shuffling=True,  # the order of the examples is part of the data set
    )

  def _split_generators(self, dl_manager) -> dict[str, Iterator[tuple[int, Example]]]:
    splits = self.examples(archives.fetch(self.ARCHIVE))
    return {split: self._generate_examples(examples) for split, examples in splits.items()}

  def _generate_examples(self, examples: list[Example]) -> Iterator[tuple[int, Example]]:
    yield from enumerate(examples)


def png(image: Image.Image) -> io.BytesIO:
  """The image as a PNG file. TFDS would encode an array with TensorFlow, which is not needed."""
  file = io.BytesIO()
  image.save(file, 'png')
  file.seek(0)
  return file
