"""Find files of `configs/` in a checkout or in the installed package.

Documentation names experiments, tasks, prompts and hardware as in a checkout, such as
`configs/train_tiny.py`; an installed package has the same folder beside its modules.
"""

import importlib.util
from pathlib import Path

_FOLDER = "configs"


def packaged(path: str) -> str:
    """Return a path that exists; else, if it is below `configs/`, the installed package's.

    A path that exists nowhere is returned unchanged, for its reader to refuse.
    """
    parts = Path(path).parts
    if parts[:1] != (_FOLDER,) or Path(path).exists():
        return path
    spec = importlib.util.find_spec(_FOLDER)
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        installed = Path(folder).joinpath(*parts[1:])
        if installed.exists():
            return str(installed)
    return path
