"""`kernel.c` as a library: compiled once with the machine's own C compiler, kept in the cache folder, loaded.

No package has to be installed for it, and none is missed: without a compiler, or with `CHARLM_NATIVE=0`,
`library` returns None and generation takes the readable path. The file's name is a digest of the source,
the compiler's command and the processor, so that no other source and no other machine's code is ever loaded,
and one of its content, so that none is loaded in part.
The structures mirror those of `kernel.c`, field by field; `fast.py` fills them.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from threading import Lock

from charlm.files.folders import cache_folder

__all__ = ["Choice", "Layer", "Matrix", "Model", "NGrams", "Pass", "library"]

_SOURCE = Path(__file__).with_name("kernel.c")
_OPTIONS = ("-O3", "-std=gnu11", "-shared", "-fPIC", "-pthread", "-fno-math-errno")
_PATIENCE_SECONDS = 60.0
_log = logging.getLogger("charlm.generation")

_pointer = ctypes.c_void_p
_int = ctypes.c_int64


class Matrix(ctypes.Structure):
    """A packed matrix and its bias."""

    _fields_ = (("weights", _pointer), ("bias", _pointer), ("K", _int), ("N", _int))


class Layer(ctypes.Structure):
    """One block of a GPT."""

    _fields_ = (
        *((name, _pointer) for name in ("gain1", "shift1", "gain2", "shift2")),
        *((name, Matrix) for name in ("query", "key_value", "project", "up", "gate", "down")),
    )


class Model(ctypes.Structure):
    """All that a pass reads of a model."""

    _fields_ = (
        *((name, _int) for name in ("C", "Cp", "H", "D", "Dp", "V", "Vp")),
        *((name, _int) for name in ("n_layer", "norm", "activation", "qk_norm", "half")),
        *((name, ctypes.c_double) for name in ("norm_eps", "qk_eps")),
        *((name, _pointer) for name in ("token_embedding", "position_embedding", "cos", "sin")),
        *((name, _pointer) for name in ("gain", "shift")),
        ("head", Matrix),
        ("layers", ctypes.POINTER(Layer)),
    )


class Pass(ctypes.Structure):
    """What one pass reads of the texts, and where it writes."""

    _fields_ = (
        *((name, _int) for name in ("B", "n", "wanted", "threads", "capacity")),
        *((name, _pointer) for name in ("begin", "slot", "id", "position", "want", "keys", "values")),
        ("slots", _int),
        *((name, _pointer) for name in ("logits", "work")),
    )


class Choice(ctypes.Structure):
    """How an id is chosen."""

    _fields_ = (*((name, ctypes.c_double) for name in ("temperature", "top_p", "min_p")), ("top_k", _int))


class NGrams(ctypes.Structure):
    """The tables of an n-gram model, where they lie."""

    _fields_ = (
        *((name, _int) for name in ("V", "M", "order")),
        *((name, _pointer) for name in ("codes", "counts", "discounts")),
    )


_lock = Lock()
_loaded: list[ctypes.CDLL | None] = []  # empty until it was tried


def library() -> ctypes.CDLL | None:
    """Return the compiled kernel; None where there is none to be had, or `CHARLM_NATIVE` is 0.

    The first call on a machine compiles, which takes about a second; the first of a process loads.
    """
    if os.environ.get("CHARLM_NATIVE") == "0":
        return None
    with _lock:
        if not _loaded:
            _loaded.append(_load())
        return _loaded[0]


def _load() -> ctypes.CDLL | None:
    try:
        compiler = _compiler()
        if compiler is None:
            _log.info("no C compiler was found (cc, gcc or clang): generating with PyTorch, which is slower")
            return None
        try:
            return _declared(_compiled(compiler, cache_folder() / "native"))
        except OSError as error:  # a folder that cannot be written, or does not allow programs
            _log.info("compiling the kernel of generation anew for this process: %s", error)
            with tempfile.TemporaryDirectory(prefix="charlm-") as folder:
                return _declared(_compiled(compiler, Path(folder)))
    except (OSError, ValueError, subprocess.SubprocessError) as error:  # ValueError: a quote that never ends
        _log.warning("the kernel of generation cannot be used, generating with PyTorch: %s", error)
        return None


def _compiler() -> list[str] | None:
    if sys.platform == "win32":  # the kernel is written for POSIX threads
        return None
    if named := os.environ.get("CC"):
        return shlex.split(named)
    return next(([found] for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


def _compiled(compiler: list[str], folder: Path) -> Path:
    """Return the library in a folder, compiled if it is not there.

    Raises:
        OSError: the folder or the compiler cannot be used.
        subprocess.SubprocessError: the compiler refuses the source.
    """
    source = _SOURCE.read_bytes()
    known = repr((source, compiler, _OPTIONS, platform.machine(), platform.system(), _processor())).encode()
    name = f"kernel-{_digest(known)}"
    for there in folder.glob(f"{name}-*.so"):
        _refuse_foreign(there)
        if there.name == f"{name}-{_digest(there.read_bytes())}.so":
            return there  # whole: to load a part of a library can end the process
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, temporary = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(descriptor)
    try:
        # Some compilers do not know this processor, or this option.
        for tuned in (["-march=native"], []):
            command = [*compiler, *_OPTIONS, *tuned, str(_SOURCE), "-o", temporary, "-lm"]
            done = subprocess.run(  # noqa: S603 - the user's own compiler, on our own file
                command, check=False, capture_output=True, errors="replace", timeout=_PATIENCE_SECONDS
            )
            if done.returncode == 0:
                break
        else:
            reason = (done.stderr.strip().splitlines() or [f"{compiler[0]} failed"])[0]
            raise subprocess.SubprocessError(reason)
        Path(temporary).chmod(0o700)  # as `_refuse_foreign` wants it, whatever the linker and the umask made
        target = folder / f"{name}-{_digest(Path(temporary).read_bytes())}.so"
        Path(temporary).replace(target)  # in one step: another process may do the same
    finally:
        with suppress(FileNotFoundError):
            Path(temporary).unlink()
    return target


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _processor() -> str:
    """Return what code for this very processor depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.node()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _refuse_foreign(path: Path) -> None:
    status = path.stat()
    if status.st_uid not in {0, os.getuid()} or status.st_mode & 0o022:
        raise PermissionError(f"{path} could have been written by others")


def _declared(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    loaded.charlm_work.argtypes = (ctypes.POINTER(Model), _int, _int, _int)
    loaded.charlm_work.restype = _int
    loaded.charlm_pass.argtypes = (ctypes.POINTER(Model), ctypes.POINTER(Pass))
    loaded.charlm_pass.restype = None
    loaded.charlm_choose.argtypes = (
        *(_pointer, _int, _int, _int, ctypes.POINTER(Choice)),
        *(_pointer, _pointer, _pointer, _pointer),
    )
    loaded.charlm_choose.restype = _int
    loaded.charlm_ngrams.argtypes = (ctypes.POINTER(NGrams), _pointer, _int, _int, _pointer)
    loaded.charlm_ngrams.restype = None
    loaded.charlm_digest.argtypes = (_pointer, _int)
    loaded.charlm_digest.restype = ctypes.c_uint64
    return loaded
