"""Which of two texts does a sentence come from? Two models, and how likely each of them holds it.

python examples/score_texts.py [FILE or corpus name] [another]
"""

import math
import sys

from charlm import BlockDataset, CharLM, CharTokenizer, NGramLM, load_corpus


def main(first: str = "tinyshakespeare", second: str = "python-docs") -> None:
    names = [first, second]
    texts = [load_corpus(name) for name in names]
    # One vocabulary, so that both models can read every sentence. Nothing is impossible for a counted model,
    # not even a character that its own text lacks.
    tokenizer = CharTokenizer.from_text(texts)
    models, held_out = [], []
    for text in texts:
        cut = int(0.9 * len(text))
        train = BlockDataset.from_text(text[:cut], tokenizer, block_size=64)
        models.append(CharLM(NGramLM(tokenizer.vocab_size, order=5).fit(train), tokenizer))
        held_out.append(text[cut:])

    # A whole text: the exact loss over all of it, per character.
    print("perplexity per character of the last tenth of")
    for name, text in zip(names, held_out, strict=True):
        values = [lm.evaluate(text).perplexity for lm in models]
        columns = ", ".join(f"{value:8.2f} by {by}" for value, by in zip(values, names, strict=True))
        print(f"  {name}: {columns}")

    # A line: the log-probability of all of it, from each model. The higher one tells where it is from.
    right = total = 0
    for source, text in enumerate(held_out):
        lines = [line for line in text.splitlines() if len(line) >= 20][:300]
        for i, line in enumerate(lines):
            scores = [lm.log_probs(line) for lm in models]  # (n,) each: natural logarithms, one per character
            sums = [score.sum() for score in scores]
            guess = sums.index(max(sums))
            right, total = right + (guess == source), total + 1
            if i % 100 == 0:
                perplexities = " and ".join(f"{math.exp(-score.mean()):.1f}" for score in scores)
                ahead = abs(sums[0] - sums[1]) / math.log(10)
                print(
                    f"\n{line.strip()!r} from {names[source]}\n  perplexity {perplexities}: {names[guess]}",
                    end="",
                )
                print(f", 10^{ahead:.0f} times as likely")
    print(f"\n{right} of {total} lines of the held-out texts were given to the right one")


if __name__ == "__main__":
    main(*sys.argv[1:])
