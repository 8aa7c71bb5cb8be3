"""Long round trips of `charlm.compression`, by hand: all of Unicode, long texts, damage.

    python tests/reliability/compression.py --megabytes 10 --trials 200

The long text is pieces of Python's documentation in random order, with random characters of all Unicode and
random bytes strewn in. Each trial damages a compressed text at a random place, or cuts it: to decompress it
must be an error, and what `recover` gives must be whole blocks.
"""

from __future__ import annotations

import argparse
import random
import sys
import time

from charlm import BigramLM, CharLM, CharTokenizer, load_corpus
from charlm.compression import archive_info, compress, decompress, recover
from charlm.compression.counted import counted
from charlm.errors import CharLMError


def main() -> None:
    """Run all, and say what was seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--megabytes", type=float, default=10.0, help="of the long text (default: 10)")
    parser.add_argument("--trials", type=int, default=200, help="damaged files (default: 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-unicode", action="store_true", help="leave out the scalar values, a minute")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    if not args.no_unicode:
        lm = CharLM(BigramLM(2), CharTokenizer("ab"))
        scalars = [code for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
        draw.shuffle(scalars)
        round_trip("".join(map(chr, scalars)).encode(), lm, "all scalar values, shuffled")
        round_trip("".join(map(chr, sorted(scalars))).encode(), lm, "all scalar values, in order")
    text = load_corpus("python-docs")
    lm = counted(text)
    long = bytearray()
    while len(long) < 1e6 * args.megabytes:
        at = draw.randrange(len(text))
        long += text[at : at + draw.randrange(1, 5_000)].encode()
        if draw.random() < 0.1:
            long += chr(draw.choice([draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)])).encode()
            long += draw.randbytes(draw.randrange(3))
    round_trip(bytes(long), lm, "a long text")
    damaged(bytes(long[:20_000]), lm, draw, args.trials)


def round_trip(data: bytes, lm: CharLM, what: str) -> None:
    """Compress and decompress, and stop where that gives something else."""
    began = time.perf_counter()
    small = compress(data, lm)
    middle = time.perf_counter()
    if decompress(small, lm) != data:
        sys.exit(f"{what}: what came back is not what was compressed")
    ended = time.perf_counter()
    seconds = f"{middle - began:.0f} s and {ended - middle:.0f} s"
    print(f"{what}: {len(data):,} bytes, {len(small):,} compressed, {seconds}")


def damaged(data: bytes, lm: CharLM, draw: random.Random, trials: int) -> None:
    """Damage a compressed text in many ways, and count what was noticed."""
    small = compress(data, lm)
    whole = recover(small, lm)
    header = archive_info(small).header_size
    for _ in range(trials):
        at = draw.randrange(len(small))
        bad = small[:at] if draw.random() < 0.3 else small[:at] + draw.randbytes(1) + small[at + 1 :]
        if bad == small:
            continue
        try:
            decompress(bad, lm)
            sys.exit(f"damage at {at} was not noticed")
        except CharLMError:
            pass
        pairs = zip(recover(bad, lm), whole, strict=True) if at >= header else ()
        if any(found not in {None, wanted} for found, wanted in pairs):
            sys.exit(f"damage at {at} changed another block")
    print(f"{trials} damaged files: all noticed, no other block changed")


if __name__ == "__main__":
    main()
