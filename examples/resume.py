"""A training that stops in the middle and goes on, and ends in the same weights, bit for bit.

python examples/resume.py [FILE or corpus name] [STEPS]
"""

import copy
import sys
import tempfile

import torch

from charlm import GPT, BlockDataset, CharTokenizer, Trainer, TrainerConfig, load_corpus
from charlm.training import StepRecord


def main(source: str = "python-docs", steps: str = "200") -> None:
    text = load_corpus(source)
    tokenizer = CharTokenizer.from_text(text)
    quarter = max(1, int(steps) // 4)
    config = TrainerConfig(max_steps=int(steps), eval_interval=quarter, save_interval=quarter)
    torch.manual_seed(1337)
    model = GPT.from_config("cpu-10s", vocab_size=tokenizer.vocab_size, dropout=0.1)
    train, val = BlockDataset.from_text(text, tokenizer, model.block_size).split(0.9)

    def new_trainer(out_dir: str) -> Trainer:
        begin = copy.deepcopy(model)  # both runs begin with the same weights
        return Trainer(begin, train, config, val_data=val, tokenizer=tokenizer, out_dir=out_dir)

    def show(run: str, record: StepRecord) -> None:
        if record.step % quarter == 0:
            print(f"{run}  step {record.step}: train loss {record.loss}")

    with tempfile.TemporaryDirectory() as folder:
        whole = new_trainer(f"{folder}/whole")
        for record in whole.steps():
            show("never stopped", record)
        for record in new_trainer(f"{folder}/stopped").steps():
            show("to be stopped", record)
            if record.step == 2 * quarter + quarter // 2:
                break  # as if the process had died: what is not in a checkpoint is lost

        # Model, tokenizer, settings, optimizer and position come from the newest checkpoint.
        again = Trainer.resume(f"{folder}/stopped", train, val_data=val)
        print(f"stopped after step {record.step}; the newest checkpoint is of step {again.step}")
        for record in again.steps():
            show("resumed      ", record)

    weights, others = whole.model.state_dict(), again.model.state_dict()
    equal = all(torch.equal(weights[name], others[name]) for name in weights)
    if not equal:
        sys.exit("the resumed run has other weights")
    print(f"{sum(weight.numel() for weight in weights.values()):,} weights, equal to the last bit")


if __name__ == "__main__":
    main(*sys.argv[1:])
