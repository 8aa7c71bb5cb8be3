"""The lecture's first model: a bigram table, fitted from counts and trained by gradient.

python examples/bigram.py [FILE or corpus name]
"""

import sys

import torch

from charlm import BigramLM, BlockDataset, CharLM, CharTokenizer, Trainer, TrainerConfig, load_corpus
from charlm.evaluation import evaluate


def main(source: str = "python-docs") -> None:
    text = load_corpus(source)
    tokenizer = CharTokenizer.from_text(text)
    train, val = BlockDataset.from_text(text, tokenizer, block_size=8).split(0.9)
    print(f"{len(text):,} characters, {tokenizer.vocab_size} different ones")

    # A batch, as the lecture shows it: 4 blocks of 8 characters, and for each the next one.
    x, y = train.sample_batch(4, generator=torch.Generator().manual_seed(1337))
    print(f"first block: {tokenizer.decode(x[0])!r} -> {tokenizer.decode(y[0])!r}")

    # The best bigram table there is needs no training: count which character follows which.
    counted = BigramLM(tokenizer.vocab_size).fit(train)
    print(f"from counts:   validation loss {evaluate(counted, val).loss_nats:.4f} nats")

    # Gradient descent finds it too, only slower.
    torch.manual_seed(1337)
    model = BigramLM(tokenizer.vocab_size)
    lm = CharLM(model, tokenizer)
    print(f"before training: {evaluate(model, val).loss_nats:.4f} nats\n{lm.generate('', 100, seed=1)}\n")

    config = TrainerConfig(
        max_steps=1_000,
        batch_size=32,
        replacement=True,
        optimizer="adamw",
        learning_rate=0.1,
        betas=(0.9, 0.99),
        weight_decay=0.0,
        schedule="linear",
        eval_interval=500,
    )
    result = Trainer(model, train, config, val_data=val, device="cpu").fit()
    best = result.best.loss_nats if result.best else float("nan")
    print(f"after {result.steps} steps: {best:.4f} nats\n{lm.generate('', 300, seed=1)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
