"""What a data set is called that was given no name: after the folder that holds it.

Every `data=folder` has the same name in its settings. In results, reports and trackers this name
would make images of different folders look alike, so that the folder's own name stands in its
place. Settings and fingerprints keep `UNNAMED`: a run goes on, and results are recognized, also
where the folder was moved or renamed.
"""

from collections.abc import Sequence
from pathlib import Path

from relloc.files import path_as_text

# The `name` in conf/data/folder.yaml
UNNAMED = "folder"


def called_after(folders: str | Sequence[str]) -> str:
    """Returns what an unnamed data set in one or more folders is called.

    Example:
        >>> called_after(["/data/cats", "/data/dogs/"])
        'cats+dogs'
    """
    several = [folders] if isinstance(folders, str) else folders
    names = []
    for folder in several:
        # The root of the file system has no name
        name = path_as_text(Path(str(folder)).resolve().name)
        names.append(name or UNNAMED)
    return "+".join(names)
