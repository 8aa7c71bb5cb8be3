"""Checkpoints with files that are wrong on purpose, under manifests that vouch for them.

Someone who can write files can also write their hashes, so a verified checkpoint may still hold anything:
these helpers make such checkpoints. `Case` and `cases` draw the contents that a stranger might choose.
"""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from charlm.files import safetensors, strict_json

__all__ = ["Case", "cases", "fast_folder", "json_of", "reseal", "safetensors_file", "with_header"]


def fast_folder() -> Path:
    """Make a folder in memory where the system has one; the caller removes it."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))


def json_of(path: Path) -> dict[str, object]:
    """Return what a JSON file holds."""
    return strict_json.loads(path.read_bytes(), path=str(path), max_bytes=8 << 20)


def reseal(checkpoint: Path, **changes: object) -> None:
    """Write a manifest that fits whatever files are there, with some of its fields changed."""
    manifest = {**json_of(checkpoint / "manifest.json"), **changes}
    manifest.pop("sha256")
    if "files" not in changes:
        manifest["files"] = {
            file.name: {"size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
            for file in sorted(checkpoint.iterdir())
            if file.name != "manifest.json"
        }
    digest = hashlib.sha256(strict_json.dumps(manifest)).hexdigest()
    (checkpoint / "manifest.json").write_bytes(strict_json.dumps({**manifest, "sha256": digest}))


@dataclass(frozen=True)
class Case:
    """What a stranger might put in the place of some files.

    Attributes:
        name: says what is wrong.
        files: contents by file name; the others stay as they are.
        manifest: fields of the manifest that are changed before its own hash is made.
    """

    name: str
    files: Mapping[str, bytes]
    manifest: Mapping[str, object]


def with_header(header: object, buffer: bytes = b"", length: int | None = None) -> bytes:
    """Return a safetensors file with this header, as JSON or as raw bytes, and any length field."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + buffer


def safetensors_file(tensors: Mapping[str, tuple[str, list[int]]], identity: Mapping[str, str]) -> bytes:
    """Return a safetensors file of zeros from the types and shapes of its tensors."""
    header: dict[str, object] = {"__metadata__": dict(identity)}
    end = 0
    for name, (dtype, shape) in tensors.items():
        size = {"F64": 8, "I64": 8, "F32": 4, "BF16": 2, "F16": 2, "U8": 1, "BOOL": 1}[dtype]
        start = end
        for n in shape:
            size *= n
        end += size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    return with_header(header, bytes(end))


# Long texts are made of this letter, so that a message's share of them can be counted.
LETTER = "ж"
_VALUES: tuple[object, ...] = (
    *(0, -1, 1, 2, 7, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 10**6, 10**9, 10**18, 10**19 - 1),
    *(True, False, None, 0.5, -0.5, 1e308, 5e-324, -1e9, "", "F32", "0", "\x1b[31m\x07", "\u202e", "\0"),
    *(LETTER * 50_000, "\\" * 50_000, '"' * 20_000, "../../../etc/passwd", "/dev/zero", "__class__"),
    *(
        [],
        {},
        [0],
        [None, None, None],
        [1] * 40_000,
        ["x"] * 20_000,
        {"": {}},
        {LETTER * 100: LETTER * 1_000},
    ),
    *({f"{LETTER}{i}": i for i in range(5_000)}, [LETTER * 10_000], {"a": [[[[[[[[{}]]]]]]]]}),
    *(list(range(624)), [0, 0, 0.0], [10**6, 0, 0.0], [-(2**31), 0, 0.0], [3, None], [3, LETTER * 999]),
)
_JSON_NAMES = ("config.json", "tokenizer.json", "state.json", "run.json", "manifest.json")
_TENSOR_NAMES = ("model.safetensors", "train.safetensors")


def cases(count: int, seed: int, real: Mapping[str, bytes]) -> Iterator[Case]:
    """Yield `count` cases: the listed ones in a drawn order, and between them drawn ones.

    Args:
        count: how many.
        seed: of what is drawn.
        real: the contents of a run's own files by name, from which most cases begin.
    """
    draw = random.Random(seed)
    listed = [
        *(Case(f"{what} in {name}", {name: data}, {}) for name in _JSON_NAMES for what, data in _not_json()),
        *(Case(f"{what} in {name}", {name: data}, {}) for name in _TENSOR_NAMES for what, data in _headers()),
        *_configs(real),
        *_tokenizers(real),
        *_generators(real),
    ]
    draw.shuffle(listed)
    listed += _states(real)  # these come first
    for number in range(count):
        yield listed.pop() if listed and number % 2 else _drawn(draw, real)


def _not_json() -> Iterator[tuple[str, bytes]]:
    for depth in (33, 10**3, 10**5):
        yield f"brackets {depth} deep", b'{"a":' + b"[" * depth + b"]" * depth + b"}"
        yield f"objects {depth} deep", b'{"a":' * depth + b"0" + b"}" * depth
    for piece in (b"[", b"]", b"{", b",", b'"', b"\\", b'""', b"[],", b'"":0,', b"\\u0000", b"\0", b"0"):
        yield f"a quarter of a million of {piece!r}", (piece * 262_144)[: 256 << 10]
        yield f"two million of {piece!r}", piece * 2_000_000
        yield f"a list of {piece!r}", b'{"a":[' + piece * (130_000 // len(piece)) + b"]}"
        yield f"a text of {piece!r}", b'{"a":"' + piece * (130_000 // len(piece)) + b'"}'
    for number in (
        b"9" * 20,
        b"9" * 200_000,
        b"-0",
        b"1e999",
        b"-1e999",
        b"1e-999999999",
        b"0." + b"1" * 200_000,
    ):
        yield f"the number {number[:9]!r}", b'{"format":' + number + b"}"
    for constant in (b"NaN", b"Infinity", b"-Infinity", b"nul", b"True", b"'a'", b"1_000", b"0x10"):
        yield f"the constant {constant!r}", b'{"version":' + constant + b"}"
    yield "a duplicate key", b'{"format":"charlm.model","format":"charlm.model"}'
    yield "a duplicate key with an escape", b'{"a":1,"\\u0061":2}'
    yield "many keys", b"{" + b",".join(b'"%x":0' % i for i in range(26_000)) + b"}"
    for lone in (b"\\ud800", b"\\udfff", b"\\ud800\\ud800", b"\\udc00\\ud800"):
        yield f"the lone surrogate {lone!r}", b'{"a":"' + lone + b'"}'
    yield "many lone surrogates", b'{"a":"' + b"\\ud800" * 43_000 + b'"}'
    yield "surrogates as UTF-8", b'{"a":"\xed\xa0\x80"}'
    yield "no UTF-8", b'{"a":"\xff"}'
    yield "a byte order mark", b"\xef\xbb\xbf{}"
    yield "UTF-16", '{"a":1}'.encode("utf-16")
    yield "deep escapes", b'{"a":"' + b"\\\\" * 130_000 + b'"}'
    yield "escaped quotation marks", b'{"a":"' + b'\\"' * 130_000 + b'"}'
    yield "control characters", b'{"a":"\x1b[31m\n"}'
    yield "nothing", b""
    yield "no object", b"[]"
    yield "an empty object", b"{}"
    yield "two objects", b"{}{}"
    yield "spaces", b" " * 262_144
    yield "sixteen megabytes", b"{" + b" " * (16 << 20) + b"}"


def _headers() -> Iterator[tuple[str, bytes]]:
    for length in (
        0,
        1,
        2**20 - 1,
        2**20,
        2**31,
        2**32,
        2**53,
        2**62,
        2**63 - 1,
        2**63,
        2**64 - 8,
        2**64 - 1,
    ):
        yield f"the header length {length}", with_header(b"{}", length=length)
        yield (
            f"the header length {length} before a megabyte",
            with_header(b"{}" + b" " * (1 << 20), length=length),
        )
    for what, data in _not_json():
        if len(data) <= 1 << 20:
            yield f"{what} as the header", with_header(data)

    def one(**entry: object) -> dict[str, object]:
        return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **entry}}

    huge: list[list[Any]] = [
        *([2**32, 2**32], [2**62, 4], [2**63], [10**18, 10**18, 10**18], [2**64 - 1], [10**19 - 1] * 8),
        *([0, 2**63], [2**62, 0, 2**62], [-1], [-2, -1], [1.0], [True], ["2"], [None], [[2]], [2] + [1] * 8),
        *([1] * 100_000, [2**31] * 3),
    ]
    for shape in huge:
        yield f"the shape {str(shape)[:40]}", with_header(one(shape=shape), bytes(8))
        yield f"the shape {str(shape)[:40]} without bytes", with_header(one(shape=shape, data_offsets=[0, 0]))
    offsets: list[Any] = [
        *(
            [0, 4],
            [0, 12],
            [4, 12],
            [8, 0],
            [-8, 0],
            [0, 2**64],
            [2**63, 2**63 + 8],
            [0, 8.0],
            [0],
            [0, 8, 8],
        ),
        *(None, "0,8", [True, 8], [10**19 - 1, 10**19 - 1]),
    ]
    for pair in offsets:
        yield f"the offsets {pair}", with_header(one(data_offsets=pair), bytes(8))
    for dtype in ("F8_E4M3", "U16", "f32", "", LETTER * 50_000, None, 4, ["F32"], {"F32": 0}):
        yield f"the dtype {str(dtype)[:20]}", with_header(one(dtype=dtype), bytes(8))
    two = {name: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} for name in "ab"}
    yield "overlapping tensors", with_header(two, bytes(8))
    two["b"] = {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]}
    yield "half overlapping tensors", with_header(two, bytes(6))
    two["b"] = {"dtype": "U8", "shape": [4], "data_offsets": [5, 9]}
    yield "a gap between tensors", with_header(two, bytes(9))
    yield "trailing bytes", with_header(one(), bytes(9))
    yield "missing bytes", with_header(one(), bytes(7))
    yield "no tensor and a buffer", with_header({}, bytes(64))
    for count in (4096, 4097, 20_000):
        small = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
        yield f"{count} tensors", with_header({f"{i:x}": small for i in range(count)})
    yield "a long name", with_header({LETTER * 100_000: one()["w"]}, bytes(8))
    yield "a name of control characters", with_header({"\x1b[2J\x07\n": one(dtype="X")["w"]}, bytes(8))
    strings: list[Any] = [
        [],
        "a",
        {"a": 1},
        {"a": None},
        {"a": {"b": "c"}},
        None,
        {LETTER * 99_999: LETTER * 99_999},
    ]
    for metadata in strings:
        yield f"the metadata {str(metadata)[:20]}", with_header({"__metadata__": metadata, **one()}, bytes(8))
    large = one(shape=[1 << 22], data_offsets=[0, 1 << 24])
    yield "16 megabytes of zeros", with_header(large, bytes(1 << 24))


def _configs(real: Mapping[str, bytes]) -> Iterator[Case]:
    values = json.loads(real["config.json"])
    large: list[dict[str, Any]] = [
        *({name: 10**9} for name in ("n_embd", "n_layer", "vocab_size", "block_size", "n_head", "mlp_width")),
        {"n_embd": 65_536, "n_layer": 256, "n_head": 1},
        *({"vocab_size": 1_114_112}, {"block_size": 1_048_576}, {"mlp_width": 1_048_576}, {"n_layer": 256}),
        {"n_embd": 1, "n_head": 1, "n_layer": 256},
        {"block_size": 1_048_576, "position": "rotary", "n_embd": 2, "n_head": 1},
        *({f"{LETTER}{i}": 0 for i in range(count)} for count in (10, 1_000, 15_000)),
        *({f"n_laye{i:x}": 0 for i in range(count)} for count in (100, 10_000)),
    ]
    for fields in large:
        changed = {**values, "config": {**values["config"], **fields}}
        yield Case(f"the settings {str(fields)[:50]}", {"config.json": json.dumps(changed).encode()}, {})
    identity = _identity(real)
    for kind, config, numbers in (
        ("bigram", {"vocab_size": 3_500}, 3_500**2),
        ("ngram", {"vocab_size": 7, "order": 3, "n_ngrams": 4 << 20}, 2 * (4 << 20) + 9),
        ("gpt", {**values["config"], "n_embd": 1_024, "n_head": 1}, 13 << 20),
        ("gpt", {**values["config"], "n_embd": 1, "n_head": 1, "n_layer": 256}, 10**6),
    ):
        for dtype in ("U8", "BF16"):  # as many numbers as the model has, in fewer bytes or under another name
            settings = json.dumps({**values, "kind": kind, "config": config}).encode()
            weights = safetensors_file({"w": (dtype, [numbers])}, identity)
            name = f"{numbers} numbers of {dtype} as a {kind}"
            yield Case(name, {"config.json": settings, "model.safetensors": weights}, {})


def _tokenizers(real: Mapping[str, bytes]) -> Iterator[Case]:
    def of(vocab: str, **fields: object) -> bytes:
        values = {
            "format": "charlm.tokenizer",
            "version": 1,
            "kind": "character",
            "unknown": None,
            "vocab": vocab,
        }
        return json.dumps({**values, **fields}, ensure_ascii=False).encode("utf-8", "surrogatepass")

    every = "".join(chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000)
    for what, data in (
        ("all characters", of(every)),
        ("all characters, the last twice", of(every + every[-1])),
        ("eight million of one letter", of("a" * 8_000_000)),
        ("two million of one large letter", of("\U0010ffff" * 2_000_000)),
        ("all characters as escapes", json.dumps(json.loads(of(every[:700_000]))).encode()),
        ("a million escapes", b'{"vocab":"' + b"\\u0041" * 1_300_000 + b'"}'),
        ("a million lone surrogates", b'{"vocab":"' + b"\\ud800" * 1_300_000 + b'"}'),
        ("four million escaped backslashes", b'{"vocab":"' + b"\\\\" * 4_000_000 + b'"}'),
        ("an empty vocabulary", of("")),
        ("a surrogate", of("\ud800")),
        ("the unknown character of another", of("ab", unknown="c")),
        ("two unknown characters", of("ab", unknown="ab")),
        ("a long unknown character", of("ab", unknown=LETTER * 10**6)),
        ("eight megabytes of fields", of("ab", more=LETTER * 4_000_000)),
        ("unknown fields", of("ab", **{f"{LETTER}{i}": 0 for i in range(10_000)})),
        ("another size of vocabulary", of("abc")),
        ("bytes", of("", kind="byte")),
    ):
        yield Case(f"{what} as the tokenizer", {"tokenizer.json": data}, {})


def _generators(real: Mapping[str, bytes]) -> Iterator[Case]:
    """Yield states of random generators that no generator was ever in."""
    tensors, metadata = safetensors.loads(bytearray(real["train.safetensors"]), path="train.safetensors")
    for name in ("rng.torch", "rng.numpy", "rng.python"):
        state = tensors[name]
        for what, changed in (
            ("empty", state[:0]),
            ("a scalar", state[0]),
            ("half as long", state[: len(state) // 2]),
            ("twice as long", state.repeat(2)),
            ("two-dimensional", state[None]),
            ("zero", torch.zeros_like(state)),
            ("the largest numbers", torch.full_like(state, torch.iinfo(state.dtype).max)),
            ("negative", -torch.ones_like(state)),
            ("infinite", torch.full(state.shape, torch.inf)),
            ("true", torch.ones(state.shape, dtype=torch.bool)),
        ):
            data = b"".join(safetensors.dumps({**tensors, name: changed}, metadata))
            yield Case(f"{name} is {what}", {"train.safetensors": data}, {})


def _states(real: Mapping[str, bytes]) -> Iterator[Case]:
    """Yield states of a training that once broke a promise, or nearly."""
    values = json.loads(real["state.json"])
    config = values["config"]
    broken: list[Any] = [[0], [0, LETTER, 0.0], [0, 0, None], {}]
    names: list[Any] = [LETTER * 9_999, "\x1b[2J", [[]]]
    kept: list[Any] = [[{}] * 40_000, [LETTER * 9_999], [None]]
    positions: list[Any] = [10**6, -1, 625, -(2**31), 2**31, 10**18, True, 3.5, None, "3", []]
    lists: Any = LETTER * 30
    for _ in range(4):
        lists = [lists] * 6
    changes: list[dict[str, Any]] = [
        *({"rng": {**values["rng"], "numpy": [position, 0, 0.0]}} for position in positions),
        *({"rng": {**values["rng"], "numpy": numpy}} for numpy in broken),
        {"block_size": {**values["block_size"], "val": "\x1b[2J" + LETTER * 9_999}},
        *({"optimizers": [each]} for each in names),
        *({"config": {**config, "max_steps": steps}} for steps in ("many", None, 10**18, 1.5)),
        *({"config": {**config, key: 0}} for key in ("\x1b[2J", LETTER * 9_999)),
        {"config": {**config, **{f"{LETTER}{i}": i for i in range(15_000)}}},
        {"environment": {"torch": LETTER * 9_999, "numpy": "\x1b[2J", "python": [[]]}},
        {"config": {**config, "max_steps": lists, "betas": lists}},
        {"optimizers": lists, "block_size": lists, "callbacks": lists},
        {"block_size": {"train": lists, "val": lists}},
        *({"seconds": seconds} for seconds in (1e308, -1e308, 10**18)),
        {"data": {"train": LETTER * 9_999}},
        *({"callbacks": states} for states in kept),
    ]
    for change in changes:
        name = f"the state {str(change)[:60]}"
        yield Case(name, {"state.json": json.dumps({**values, **change}).encode()}, {})


def _identity(real: Mapping[str, bytes]) -> dict[str, str]:
    return {key: str(json.loads(real["manifest.json"])[key]) for key in ("run_id", "save_id", "step")}


def _drawn(draw: random.Random, real: Mapping[str, bytes]) -> Case:
    """Return a real file with one or two of its values changed, missing or added."""
    name = draw.choice([*_JSON_NAMES, "state.json", "config.json", *_TENSOR_NAMES])
    if name in _TENSOR_NAMES:
        length = int.from_bytes(real[name][:8], "little")
        header, buffer = json.loads(real[name][8 : 8 + length]), real[name][8 + length :]
        what = _changed(draw, header)
        return Case(f"{what} in {name}", {name: with_header(header, buffer)}, {})
    values = json.loads(real[name])
    what = "; ".join(_changed(draw, values) for _ in range(draw.choice((1, 1, 2))))
    if name == "manifest.json":
        values.pop("sha256", None)
        return Case(f"{what} in {name}", {}, values)
    return Case(f"{what} in {name}", {name: json.dumps(values).encode()}, {})


def _changed(draw: random.Random, values: dict[str, object]) -> str:
    """Change one value somewhere inside a JSON object, and say what was done."""
    inner: dict[str, object] | list[object] = values
    path = ""
    while True:
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        if not keys or draw.random() < 0.1:
            break
        key = draw.choice(keys)
        value = inner[key]  # type: ignore[index, call-overload]  # a str for a dict, an int for a list
        path += f"/{key}"
        if isinstance(value, (dict, list)) and draw.random() < 0.7:
            inner = value
            continue
        if draw.random() < 0.15:
            del inner[key]  # type: ignore[arg-type]  # as above
            return f"no {path}"
        new = draw.choice(_VALUES)
        inner[key] = new  # type: ignore[index, call-overload]  # as above
        return f"{str(new)[:40]!r} in {path}"
    new, extra = draw.choice(_VALUES), draw.choice(("", "extra", "n_layers", "__metadata__", "w"))
    if isinstance(inner, dict):
        inner[extra] = new
    else:
        inner.append(new)
    return f"{str(new)[:40]!r} added to {path or '/'}"
