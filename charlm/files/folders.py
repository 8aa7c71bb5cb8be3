"""`cache_folder`: the folder of this machine for files that can be made or downloaded again."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from charlm.errors import CorpusError

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """Return the folder for files that can be made or downloaded again.

    It is `$CHARLM_CACHE_DIR`; else `$XDG_CACHE_HOME/charlm` if that is an absolute path; else the usual
    folder of the operating system.

    Raises:
        CorpusError: the user has no home directory, and no variable is set.
    """
    if chosen := os.environ.get("CHARLM_CACHE_DIR"):
        return Path(chosen)
    if (xdg := Path(os.environ.get("XDG_CACHE_HOME", ""))).is_absolute():
        return xdg / "charlm"
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local, "charlm", "Cache")
    try:
        home = Path.home()
    except RuntimeError as error:
        raise CorpusError(
            "there is no home directory for the cache; set CHARLM_CACHE_DIR to a folder"
        ) from error
    if sys.platform == "win32":
        return home / "AppData" / "Local" / "charlm" / "Cache"
    return home / "Library" / "Caches" / "charlm" if sys.platform == "darwin" else home / ".cache" / "charlm"
