"""Seconds to fit an n-gram model and to score the validation text, and its loss, for each order.

Both are timed in this process, without imports and encoding. The loss is that of the whole validation text,
every target once, in windows of --block-size characters; the model itself has no limit.

    cd tests
    python -m benchmarks.ngram --json ngram.json
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from benchmarks.common import Json, announce, machine, new_parser, report, spread, table

from charlm import BlockDataset, CharTokenizer, load_corpus
from charlm.evaluation import evaluate
from charlm.models.ngram import NGramLM

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Fit and score each order several times, and report."""
    parser = new_parser(__doc__)
    parser.add_argument(
        "--orders", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6, 7, 8, 10], help="default: 1 to 8, and 10"
    )
    parser.add_argument("--block-size", type=int, default=1_024, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.quick:
        args.orders, args.block_size, args.rounds = [1, 3], 64, 1
    measured_on = machine()
    text = load_corpus(args.data)
    tokenizer = CharTokenizer.from_text(text)
    train, val = BlockDataset.from_text(text, tokenizer, args.block_size).split(0.9)
    times: dict[int, list[tuple[float, float]]] = {order: [] for order in args.orders}
    results: Json = {}
    for _ in range(args.rounds):
        for order in args.orders:
            began = time.perf_counter()
            model = NGramLM(tokenizer.vocab_size, order=order).fit(train)
            fitted = time.perf_counter()
            result = evaluate(model, val)
            ended = time.perf_counter()
            times[order].append((fitted - began, ended - fitted))
            results[str(order)] = {
                "loss_nats": result.loss_nats,
                "bits_per_char": result.bits_per_char,
                "accuracy": result.accuracy,
                "parameters": model.num_parameters(),
            }
            announce(f"order {order}: {result.loss_nats:.4f} nats in {ended - began:.2f} s")
    for order, pairs in times.items():
        results[str(order)] |= {
            "fit_seconds": spread([fit for fit, _ in pairs]),
            "evaluate_seconds": spread([score for _, score in pairs]),
            "seconds": spread([fit + score for fit, score in pairs]),
        }
    rows = [
        [
            order,
            f"{values['loss_nats']:.4f}",
            f"{values['parameters']:,}",
            f"{values['fit_seconds']['median']:.2f}",
            f"{values['evaluate_seconds']['median']:.2f}",
            f"{values['seconds']['median']:.2f}",
        ]
        for order, values in results.items()
    ]
    report(
        "ngram",
        args,
        measured_on=measured_on,
        settings={"block_size": args.block_size},
        results=results,
        text=table(["order", "val nats", "parameters", "fit s", "evaluate s", "both s"], rows),
    )


if __name__ == "__main__":
    main()
