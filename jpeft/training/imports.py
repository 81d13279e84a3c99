"""The modules from outside jpeft in which the parts of a run were registered."""

from collections.abc import Iterable

from jpeft import cli, data, methods, quant, tasks

from .writers import writer_modules


def imports_of(config, reads: str) -> list[str]:
  """What has to be imported before a run of `config` can be opened: module names, paths of files.

  Empty where all parts are jpeft's own. `reads` is the name of the backbone's modality.
  """
  # Each registry knows where a part was registered: None for parts of jpeft itself.
  modules = [
    methods.REGISTRY[config.method.name].module,
    data.registered_module(config.data.name),
    tasks.registered_module(config.eval.metric),
    quant.registered_module(config.model.quantize),
    tasks.modality_module(reads),
    *writer_modules(config),
  ]
  return sorted({cli.reference_of(module) for module in modules if module is not None})


def check_imported(owner, references: Iterable[str]) -> None:
  """Raises a ValueError that names the modules which have not been imported.

  Args:
    owner: what needs them, at the start of the sentence.
    references: from `imports_of`.
  """
  missing = [reference for reference in references if not cli.is_imported(reference)]
  if missing:
    flags = ' '.join(f'--import {reference}' for reference in missing)
    raise ValueError(
      f'{owner} uses parts that are registered in {" and ".join(missing)}: import that first, '
      f'or give {flags}'
    )
