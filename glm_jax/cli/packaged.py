"""Files that come with the project: experiments, tasks, prompts, figures of hardware.

Documentation names them as they lie in a checkout, `configs/train_tiny.py`; an installed
package has the same folder beside its modules.
"""

import importlib.util
from pathlib import Path

_FOLDER = "configs"


def packaged(path: str) -> str:
    """The path where it exists; else, of one below `configs/`, that of the installed package.

    A path that exists nowhere comes back unchanged, for its reader to refuse.
    """
    given = Path(path)
    if given.exists() or given.is_absolute() or given.parts[:1] != (_FOLDER,):
        return path
    found = importlib.util.find_spec(_FOLDER)
    places = found.submodule_search_locations if found is not None else None
    for place in places or ():
        installed = Path(place).joinpath(*given.parts[1:])
        if installed.exists():
            return str(installed)
    return path
