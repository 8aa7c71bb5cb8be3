"""What a draft gains: a trained model writes alone, and with its run's n-gram baseline guessing ahead.

The texts are the same, which is checked. Guesses come out right as often as the two models agree, so the
model has to be a trained one. `--layers` adds layers that change nothing (their last projections are zero):
it agrees as often, at the cost of a larger model.

    cd tests
    python -m charlm train tinyshakespeare -o ../runs/five --preset cpu-5min
    python -m benchmarks.draft ../runs/five --layers 4,8,13 --json draft.json
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from benchmarks.common import Json, announce, in_turns, machine, new_parser, report, spread, table
from numpy.typing import NDArray
from torch import Tensor

import charlm
from charlm import GPT, LanguageModel
from charlm.generation import Draft, SamplingOptions
from charlm.generation.drafting import stream_drafted
from charlm.models.ngram import NGramLM

__all__ = ["main"]

_TEMPERATURES = (0.0, 0.5, 0.8, 1.0)
_SEED = 1337


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each depth at each temperature and report."""
    parser = new_parser(__doc__, data=False)
    parser.add_argument("run", type=Path, help="of charlm train, with its n-gram baseline")
    parser.add_argument(
        "--layers", help="how many, comma-separated, at least the model's own (default: those)"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="turns, each with a seed (default: %(default)s)"
    )
    parser.add_argument("-n", type=int, default=1000, help="characters in a turn (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.quick:
        args.rounds, args.n = 1, 20
    measured_on = machine()
    model = charlm.load(args.run, device="cpu").model
    draft = NGramLM.load(args.run / "ngram")
    if not isinstance(model, GPT):
        raise SystemExit(f"error: {args.run} holds no GPT")
    depths = [int(n) for n in args.layers.split(",")] if args.layers else [model.config.n_layer]
    if min(depths) < model.config.n_layer:
        raise SystemExit(f"error: --layers must be at least the model's own, {model.config.n_layer}")
    results: Json = {}
    for depth in depths:
        deeper = _deeper(model, depth)
        key = f"{deeper.num_parameters():,}"
        results[key] = {}
        for temperature in _TEMPERATURES:
            announce(f"{key}, temperature {temperature:g}")
            results[key][f"{temperature:g}"] = _measured(deeper, draft, temperature, args.n, args.rounds)
    rows = [
        (
            size,
            temperature,
            f"{found['alone']['chars_per_second']['median']:,.0f}",
            f"{found['drafted']['chars_per_second']['median']:,.0f}",
            f"{found['times_faster']['median']:.2f} ({found['times_faster']['least']:.2f} to "
            f"{found['times_faster']['most']:.2f})",
            f"{found['right_share']:.0%}",
            f"{found['chars_per_pass']:.2f}",
        )
        for size, temperatures in results.items()
        for temperature, found in temperatures.items()
    ]
    head = (
        "parameters",
        "temperature",
        "alone, characters/s",
        "with the draft",
        "times faster",
        "right guesses",
    )
    text = f"threads: {torch.get_num_threads()}\n\n" + table((*head, "characters a pass"), rows)
    report(
        "draft",
        args,
        measured_on=measured_on,
        settings={"model": model.config.to_dict(), "draft": draft.config.to_dict(), "overflow": "restart"},
        results=results,
        text=text,
    )


def _deeper(model: GPT, n_layer: int) -> GPT:
    """Return a model with further layers that does the same."""
    deeper = GPT(model.config.replace(n_layer=n_layer)).eval()
    known = model.state_dict()
    with torch.no_grad():
        for name, tensor in deeper.state_dict().items():
            if name in known:
                tensor.copy_(known[name])
            elif name.endswith("c_proj.weight"):
                tensor.zero_()
    return deeper


def _measured(model: GPT, draft: NGramLM, temperature: float, count: int, rounds: int) -> Json:
    start = torch.zeros(1, 1, dtype=torch.int64)
    texts: dict[str, list[Tensor]] = {"alone": [], "drafted": []}

    def write(name: str, with_draft: Draft | None) -> None:
        seed = _SEED + len(texts[name])
        texts[name].append(
            model.generate(
                start, count, temperature=temperature, seed=seed, overflow="restart", draft=with_draft
            )
        )

    seconds = in_turns(
        {"alone": partial(write, "alone", None), "drafted": partial(write, "drafted", draft)}, rounds
    )
    if not all(map(torch.equal, texts["alone"], texts["drafted"])):
        raise SystemExit("error: the draft has changed a text")
    options = SamplingOptions(temperature=temperature, seed=_SEED, overflow="restart")
    ratios = [a / b for a, b in zip(seconds["alone"], seconds["drafted"], strict=True)]
    return {
        **{name: {"chars_per_second": spread([count / s for s in seconds[name]])} for name in seconds},
        "times_faster": spread(ratios),
        **_agreement(model, draft, options, count),
    }


def _agreement(model: LanguageModel, draft: NGramLM, options: SamplingOptions, count: int) -> Json:
    """Return the share of right guesses, and how many characters a pass brings, where there are guesses."""
    state, ahead = model.new_state(overflow=options.overflow), draft.new_state()
    start = torch.zeros(1, 1, dtype=torch.int64)
    state.observe(start)
    ahead.observe(start)
    guessed = right = passes = 0
    last: list[int] = []  # the guesses of this pass
    verify, observe, took = state.verify, state.observe, state.took

    def verifying(guesses: Tensor) -> Tensor:
        last[:] = guesses.tolist()
        return verify(guesses)

    def observing(ids: Tensor | Sequence[Tensor]) -> None:
        nonlocal guessed, right, passes
        agreed = sum(a == b for a, b in zip(last, ids[0].tolist(), strict=False))
        guessed += min(agreed + 1, len(last))  # those after a wrong one are neither right nor wrong
        right += agreed
        passes += 1
        last.clear()
        observe(ids)

    def taking(ids: NDArray[np.int64]) -> None:
        nonlocal passes
        passes += 1
        took(ids)

    state.verify = verifying  # type: ignore[method-assign]  # for this state alone
    state.observe = observing  # type: ignore[method-assign]
    state.took = taking  # type: ignore[method-assign]
    made = len(list(stream_drafted(state, ahead, count, options)))
    return {"right_share": right / max(guessed, 1), "chars_per_pass": made / max(passes, 1)}


if __name__ == "__main__":
    main()
