"""The C sources as a library: compiled once by the machine's own compiler, and kept in the cache folder.

No package has to be installed for it. Without a compiler, or with `CHARLM_NATIVE=0`, `library` returns None
and PyTorch computes. The file's name has a digest of the sources, the compiler's command and the processor,
so code of other sources or another machine is never loaded. It also has a digest of the content, so an
incomplete file is never loaded. The structures mirror those of the C files, field by field; fill them by
field names.
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
import time
from contextlib import suppress
from pathlib import Path

from charlm.files.folders import cache_folder
from charlm.locks import ForkLock

__all__ = [
    "ChoiceStruct",
    "DecoderStruct",
    "LayerStruct",
    "MatrixStruct",
    "ModelStruct",
    "NGramStruct",
    "PassStruct",
    "WalkStruct",
    "library",
    "portable_library",
    "why_no_library",
]

_SOURCES = Path(__file__).parent
"""`kernel.c`, and the headers that it includes."""
_OPTIONS = ("-O3", "-std=gnu11", "-shared", "-fPIC", "-pthread", "-fno-math-errno")
_PORTABLE = ("-ffp-contract=off", "-DPORTABLE")
"""With them every machine computes the same bits, more slowly: see `portable.h`."""
_PATIENCE_SECONDS = 60.0
_DAY = 24 * 60 * 60.0  # seconds
_SWITCHED_OFF = "the environment variable CHARLM_NATIVE is 0"
_log = logging.getLogger("charlm.native")

_pointer = ctypes.c_void_p
_int = ctypes.c_int64


class MatrixStruct(ctypes.Structure):
    """A packed matrix and its bias."""

    _fields_ = (
        *((name, _pointer) for name in ("weights", "bias", "scales", "starts")),
        *((name, _int) for name in ("K", "N")),
    )


class LayerStruct(ctypes.Structure):
    """One block of a GPT."""

    _fields_ = (
        *((name, _pointer) for name in ("gain1", "shift1", "gain2", "shift2")),
        *((name, MatrixStruct) for name in ("query", "key_value", "project", "up", "gate", "down")),
    )


class ModelStruct(ctypes.Structure):
    """A model, for a pass."""

    _fields_ = (
        *((name, _int) for name in ("C", "Cp", "H", "D", "Dp", "V", "Vp")),
        *((name, _int) for name in ("n_layer", "norm", "activation", "qk_norm", "storage", "earlier")),
        *((name, ctypes.c_double) for name in ("norm_eps", "qk_eps")),
        *((name, _pointer) for name in ("token_embedding", "position_embedding", "convolution")),
        *((name, _pointer) for name in ("cos", "sin", "gain", "shift")),
        ("head", MatrixStruct),
        ("layers", ctypes.POINTER(LayerStruct)),
    )


class PassStruct(ctypes.Structure):
    """The input of one pass, and the places of its output."""

    _fields_ = (
        *((name, _int) for name in ("B", "n", "wanted", "threads", "capacity")),
        *(
            (name, _pointer)
            for name in ("begin", "slot", "id", "before", "position", "want", "keys", "values")
        ),
        *((name, _int) for name in ("slots", "half")),
        *((name, _pointer) for name in ("logits", "work", "how", "walk", "uniforms", "chosen")),
    )


class ChoiceStruct(ctypes.Structure):
    """The options of the choice of an id."""

    _fields_ = (*((name, ctypes.c_double) for name in ("temperature", "top_p", "min_p")), ("top_k", _int))


class WalkStruct(ctypes.Structure):
    """The states of texts in an automaton."""

    _fields_ = (
        *((name, _pointer) for name in ("column", "next", "distance")),
        *((name, _int) for name in ("K", "left", "ends")),
        ("state", _pointer),
    )


class NGramStruct(ctypes.Structure):
    """The addresses of an n-gram model's tables."""

    _fields_ = (
        *((name, _int) for name in ("V", "M", "order", "window", "lengths", "places")),
        *((name, _pointer) for name in ("codes", "counts", "discounts", "shares", "place", "seen")),
    )


class DecoderStruct(ctypes.Structure):
    """The progress of decoding the bytes of a compressed block."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("code", "range")),
        ("bytes", ctypes.c_char_p),
        *((name, _int) for name in ("size", "at", "may", "read", "escaped", "total")),
    )


_lock = ForkLock()
_tried: list[ctypes.CDLL | str] = []
"""Empty before the first attempt; then the library, or the reason why there is none."""
_tried_portable: list[ctypes.CDLL | str] = []
"""The same for the portable build."""


def library() -> ctypes.CDLL | None:
    """Return the compiled library, or None; `why_no_library` has the reason.

    The first call on a machine compiles it, which takes about a second. The first call in a process loads it.
    """
    found = _library_or_reason()
    return None if isinstance(found, str) else found


def portable_library() -> ctypes.CDLL | str:
    """Return the build with the same bits on every machine, or the reason why there is none."""
    if os.environ.get("CHARLM_NATIVE") == "0":
        return _SWITCHED_OFF
    with _lock.lock:
        if not _tried_portable:
            _tried_portable.append(_load(_PORTABLE))
        return _tried_portable[0]


def why_no_library() -> str | None:
    """Return the reason why this process has no compiled library, or None if it has one."""
    found = _library_or_reason()
    return found if isinstance(found, str) else None


def _library_or_reason() -> ctypes.CDLL | str:
    if os.environ.get("CHARLM_NATIVE") == "0":
        return _SWITCHED_OFF
    with _lock.lock:
        if not _tried:
            _tried.append(_load())
        return _tried[0]


def _load(more: tuple[str, ...] = ()) -> ctypes.CDLL | str:
    try:
        compiler = _compiler()
        if isinstance(compiler, str):
            _log.info("%s: generating with PyTorch, which is slower", compiler)
            return compiler
        try:
            return _declared(_compiled(compiler, cache_folder() / "native", more))
        except OSError as error:  # a folder that cannot be written, or does not allow programs
            _log.info("compiling the native engine anew for this process: %s", error)
            with tempfile.TemporaryDirectory(prefix="charlm-") as folder:
                return _declared(_compiled(compiler, Path(folder), more))
    except (OSError, ValueError, subprocess.SubprocessError) as error:  # ValueError: a quote that never ends
        _log.warning("the native engine cannot be used, generating with PyTorch: %s", error)
        return f"it could not be compiled: {error}"


def _compiler() -> list[str] | str:
    """Return the compiler's command, or why there is none."""
    if sys.platform == "win32":
        return "it is written for POSIX threads, which Windows does not have"
    if named := os.environ.get("CC"):
        return shlex.split(named)
    found = next((there for name in ("cc", "gcc", "clang") if (there := shutil.which(name))), None)
    return "no C compiler was found (cc, gcc or clang)" if found is None or _is_stub(found) else [found]


def _is_stub(compiler: str) -> bool:
    """Return whether this is no compiler, but opens a window that offers one: macOS without Apple's tools."""
    if sys.platform != "darwin" or not compiler.startswith("/usr/bin/"):
        return False
    command = ["/usr/bin/xcode-select", "--print-path"]
    done = subprocess.run(  # noqa: S603 - the system's own program
        command, check=False, capture_output=True, timeout=_PATIENCE_SECONDS
    )
    return done.returncode != 0


def _compiled(compiler: list[str], folder: Path, more: tuple[str, ...]) -> Path:
    """Return the library in a folder, compiled if it is missing.

    Raises:
        OSError: the folder or the compiler cannot be used.
        subprocess.SubprocessError: the compiler refuses the source.
    """
    sources = [path.read_bytes() for path in sorted(_SOURCES.glob("*.[ch]"))]
    options = (*_OPTIONS, *more)
    known = repr((sources, compiler, options, platform.machine(), platform.system(), _processor())).encode()
    name = f"kernel-{_digest(known)}"
    for there in folder.glob(f"{name}-*.so"):
        _refuse_foreign(there)
        if there.name == f"{name}-{_digest(there.read_bytes())}.so":
            return there  # whole: to load a part of a library can end the process
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for left in folder.glob("tmp*.so"):  # by a process that was killed, if it is old
        with suppress(OSError):
            if left.stat().st_mtime < time.time() - _DAY:
                left.unlink()
    descriptor, temporary = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(descriptor)
    try:
        # Some compilers do not know this processor, or this option.
        for tuned in (["-march=native"], []):
            command = [*compiler, *options, *tuned, str(_SOURCES / "kernel.c"), "-o", temporary, "-lm"]
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
    """Return a description of the processor that compiled code depends on."""
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
    loaded.charlm_work.argtypes = (ctypes.POINTER(ModelStruct), _int, _int, _int)
    loaded.charlm_work.restype = _int
    loaded.charlm_pass.argtypes = (ctypes.POINTER(ModelStruct), ctypes.POINTER(PassStruct))
    loaded.charlm_pass.restype = None
    loaded.charlm_choose.argtypes = (
        *(_pointer, _int, _int, _int, ctypes.POINTER(ChoiceStruct), ctypes.POINTER(WalkStruct)),
        *(_pointer, _pointer, _pointer, _pointer),
    )
    loaded.charlm_choose.restype = _int
    loaded.charlm_turns.argtypes = (
        *(ctypes.POINTER(ModelStruct), ctypes.POINTER(PassStruct), ctypes.POINTER(ChoiceStruct)),
        *(ctypes.POINTER(WalkStruct), _pointer, _int, _pointer),
    )
    loaded.charlm_turns.restype = _int
    loaded.charlm_mixed_turns.argtypes = (
        *(ctypes.POINTER(ModelStruct), ctypes.POINTER(PassStruct), ctypes.POINTER(NGramStruct)),
        *(_pointer, _pointer, _pointer, ctypes.POINTER(ChoiceStruct)),
        *(ctypes.POINTER(WalkStruct), _pointer, _int, _pointer, _pointer),
    )
    loaded.charlm_mixed_turns.restype = _int
    loaded.charlm_ngrams.argtypes = (ctypes.POINTER(NGramStruct), _pointer, _int, _int, _pointer)
    loaded.charlm_ngrams.restype = None
    loaded.charlm_ngram_shares.argtypes = (
        *(ctypes.POINTER(NGramStruct), _pointer, _int, _int, _int),
        *(_pointer, _pointer, _pointer),
    )
    loaded.charlm_ngram_shares.restype = _int
    loaded.charlm_ngram_decode.argtypes = (
        *(ctypes.POINTER(NGramStruct), _pointer, _int, _int),
        *(_pointer, _pointer, ctypes.POINTER(DecoderStruct)),
    )
    loaded.charlm_ngram_decode.restype = _int
    loaded.charlm_mix.argtypes = (*(_int, _int, _int), *(_pointer,) * 5)
    loaded.charlm_mix.restype = None
    loaded.charlm_digest.argtypes = (_pointer, _int)
    loaded.charlm_digest.restype = ctypes.c_uint64
    return loaded
