"""A small GPT on your own text: configure, train, save, load, generate.

python examples/gpt_from_config.py [FILE or corpus name] [STEPS]
"""

import sys
import tempfile

import torch

from charlm import (
    GPT,
    BlockDataset,
    CharLM,
    CharTokenizer,
    Trainer,
    TrainerConfig,
    load,
    load_corpus,
)


def main(source: str = "python-docs", steps: str = "300") -> None:
    text = load_corpus(source)
    tokenizer = CharTokenizer.from_text(text)

    # A preset with a few fields of our own; GPTConfig(...) takes them all one by one.
    torch.manual_seed(1337)  # a module draws its first weights from torch's global generator
    model = GPT.from_config(
        "cpu-1min", vocab_size=tokenizer.vocab_size, n_layer=3, n_head=4, n_embd=96, block_size=64
    )
    config = model.config
    print(f"{config.num_parameters():,} parameters, {config.flops_per_char():,} operations per character")

    train, val = BlockDataset.from_text(text, tokenizer, config.block_size).split(0.9)
    training = TrainerConfig(max_steps=int(steps), learning_rate=0.01, eval_interval=100)
    trainer = Trainer(model, train, training, val_data=val, tokenizer=tokenizer, device="auto")
    for record in trainer.steps():
        if record.step % 50 == 0:
            print(f"step {record.step}: loss {record.loss:.3f}, {record.chars_per_second:,.0f} characters/s")
    print(f"validation: {trainer.evaluate().loss_nats:.3f} nats")

    with tempfile.TemporaryDirectory() as folder:
        CharLM(model, tokenizer).save(f"{folder}/model")
        lm = load(f"{folder}/model")
    print(lm.generate("The ", 300, temperature=0.8, seed=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
