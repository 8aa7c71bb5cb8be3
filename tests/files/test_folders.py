"""Where the cache folder is, on every system, and what is said where there can be none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from charlm.errors import CorpusError
from charlm.files.folders import cache_folder


@pytest.mark.parametrize(
    ("platform", "variables", "folder"),
    [
        ("linux", {"CHARLM_CACHE_DIR": "/c", "XDG_CACHE_HOME": "/x"}, "/c"),
        ("linux", {"CHARLM_CACHE_DIR": "relative"}, "relative"),
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/charlm"),
        ("darwin", {"XDG_CACHE_HOME": "/x"}, "/x/charlm"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/charlm"),
        ("linux", {"LOCALAPPDATA": "/local"}, "/home/me/.cache/charlm"),
        ("linux", {"CHARLM_CACHE_DIR": "", "XDG_CACHE_HOME": ""}, "/home/me/.cache/charlm"),
        ("darwin", {}, "/home/me/Library/Caches/charlm"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/charlm/Cache"),
        ("win32", {}, "/home/me/AppData/Local/charlm/Cache"),
    ],
)
def test_the_cache_folder_follows_the_system_s_conventions(
    platform: str, variables: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CHARLM_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert cache_folder() == Path(folder)


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("CHARLM_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(CorpusError, match="set CHARLM_CACHE_DIR to a folder"):
        cache_folder()
