"""Your own training loop: `steps()` trains, and everything around it is yours.

This one keeps a running mean of the loss, shows what the model writes now and then, and stops by a rule of
its own: when the loss has fallen by less than 3 % in the last hundred steps.

python examples/own_loop.py [FILE or corpus name] [STEPS at most]
"""

import sys
from collections import deque

import torch

from charlm import GPT, BlockDataset, CharLM, CharTokenizer, Trainer, TrainerConfig, load_corpus


def main(source: str = "python-docs", steps: str = "1000") -> None:
    text = load_corpus(source)
    tokenizer = CharTokenizer.from_text(text)
    torch.manual_seed(1337)
    model = GPT.from_config("cpu-10s", vocab_size=tokenizer.vocab_size)
    train, val = BlockDataset.from_text(text, tokenizer, model.block_size).split(0.9)
    config = TrainerConfig(max_steps=int(steps), learning_rate=0.01, schedule="constant")
    trainer = Trainer(model, train, config)
    lm = CharLM(model, tokenizer)  # the same model: it writes with the weights of this moment

    recent: deque[float] = deque(maxlen=50)
    before = float("inf")
    for record in trainer.steps():
        recent.append(record.loss)
        mean = sum(recent) / len(recent)
        if record.step % 100 == 0 or record.step == config.max_steps:
            print(
                f"step {record.step}: mean loss {mean:.3f} nats, {record.chars_per_second:,.0f} characters/s"
            )
            print(f"    {lm.generate('', 80, seed=1)!r}")
            if mean > 0.97 * before:
                print("the loss hardly falls any more")
                trainer.finish()  # ends the loop after this step
            before = mean
    print(
        f"{trainer.result().steps} steps, validation {trainer.evaluate(val).loss_nats:.4f} nats per character"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
