"""Images and texts for transfer: named data sets, your own files, batches that resume exactly."""

from typing import TYPE_CHECKING

from jpeft.lazy import on_first_use

from .batches import Batches
from .conventions import MARGIN, PADS, PIXELS
from .decode import check_files, decode
from .labels import labels_of
from .load import load, register_dataset, register_reader, registered_module
from .packing import Packed, prompt
from .pairs import Pairs
from .readers.files import options_of
from .readers.folder import images_below
from .readers.glue import TASKS as GLUE_TASKS
from .readers.glue import glue_input
from .readers.questions import question
from .readers.tables import Asked, asked, kind_of_table, like_columns
from .readers.vtab import TASKS as VTAB_TASKS
from .shots import few_shots
from .skipped import UNREADABLE, Skipped, first_example
from .source import Dataset, Source, in_memory, split_rows

if TYPE_CHECKING:
  from .image import image_transform
  from .masking import MaskableTexts, mask_of, masking_of
  from .text import Encoder, check_texts, row_of, text_transform
  from .views import views_transform
  from .windows import Windows
  from .words import TaggedWords

# They need Pillow and tokenizers, which are extras.
__getattr__ = on_first_use(
  __name__,
  {
    '.image': ('image_transform',),
    '.masking': ('MaskableTexts', 'mask_of', 'masking_of'),
    '.text': ('Encoder', 'check_texts', 'row_of', 'text_transform'),
    '.views': ('views_transform',),
    '.windows': ('Windows',),
    '.words': ('TaggedWords',),
  },
)


def __dir__() -> list[str]:
  return __all__


__all__ = [
  'Asked',
  'Batches',
  'Dataset',
  'Encoder',
  'GLUE_TASKS',
  'MARGIN',
  'MaskableTexts',
  'PADS',
  'PIXELS',
  'Packed',
  'Pairs',
  'Skipped',
  'Source',
  'TaggedWords',
  'UNREADABLE',
  'VTAB_TASKS',
  'Windows',
  'asked',
  'check_files',
  'check_texts',
  'decode',
  'image_transform',
  'few_shots',
  'first_example',
  'glue_input',
  'images_below',
  'in_memory',
  'kind_of_table',
  'labels_of',
  'like_columns',
  'load',
  'mask_of',
  'masking_of',
  'options_of',
  'prompt',
  'question',
  'register_dataset',
  'register_reader',
  'registered_module',
  'row_of',
  'split_rows',
  'text_transform',
  'views_transform',
]
