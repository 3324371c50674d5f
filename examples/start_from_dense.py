#!/usr/bin/env python
# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
Give experts to a dense GPT-2 that has been trained already, and train on.

    python examples/start_from_dense.py            # trains a small dense model first, then starts from its checkpoint
    python examples/start_from_dense.py --checkpoint openai-community/gpt2 --learning_rate 5e-5
    python examples/start_from_dense.py --smoke    # the same in seconds, to see that it runs

It prints perplexity by domain, here of the first command:

    dense: perplexity {'general': 207.89, 'legal': 230.79, 'medical': 301.41}
    experts in layers [1, 3], where clusters are clearest: {0: 1.16, 1: 1.35, 2: 1.32, 3: 1.32}
    start: perplexity {'general': 207.89, 'legal': 230.79, 'medical': 301.41}
    end: perplexity {'general': 141.88, 'legal': 137.39, 'medical': 195.92}

That of the start equals the dense model's; that of the end is what more training gives with experts. What it gives
without them is not shown here, but by `examples/run_clm.py --compare_with_dense`.
"""

import argparse
from pathlib import Path

from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from modeling_cse import ClusterExpertsCallback, from_dense
from modeling_cse.data import end_token_id, load_corpus, pack, split_by_domain, train_tokenizer
from modeling_cse.evaluation import PerplexityByDomain, token_losses


DATA = Path(__file__).parent / "data"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a dense GPT-2, folder or name; trained here if it is left out")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/start_from_dense"))
    parser.add_argument("--steps", type=int, default=300, help="of the dense model, and again with experts")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--block_size", type=int, default=256)
    parser.add_argument("--smoke", action="store_true", help="a few steps on a little text, in a folder of its own")
    options = parser.parse_args()
    if options.smoke:
        options.steps, options.block_size = 6, 64
        options.output_dir = options.output_dir.with_name(f"{options.output_dir.name}_smoke")
    return options


def trainer_for(model, blocks, folder: Path, options: argparse.Namespace) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=options.learning_rate,
        logging_steps=max(options.steps // 6, 1),
        save_strategy="no",
        seed=0,
    )
    return Trainer(model, arguments, train_dataset=blocks)


def train_dense(blocks, tokenizer, options: argparse.Namespace) -> Path:
    """A dense model to start from, where none is named."""
    set_seed(0)
    ids = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"n_positions": options.block_size, "n_embd": 128, "n_layer": 4, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes, **ids))
    trainer_for(model, blocks, options.output_dir / "dense", options).train()
    model.save_pretrained(options.output_dir / "dense")
    return options.output_dir / "dense"


def print_perplexity(name: str, model, validation: dict) -> None:
    metric = PerplexityByDomain()
    for domain, blocks in validation.items():
        for batch in DataLoader(blocks, batch_size=8, collate_fn=default_data_collator):
            batch = {key: value.to(model.device) for key, value in batch.items()}
            labels = batch.pop("labels")
            nll, counts = token_losses(model.eval()(**batch).logits, labels, shift=True)
            metric.add_batch(predictions=nll.tolist(), references=counts.tolist(), domains=[domain] * len(nll))
    found = metric.compute()["perplexity_by_domain"]
    print(f"{name}: perplexity", {domain: round(value, 2) for domain, value in found.items()})


def main() -> None:
    options = parse()
    corpus = load_corpus(
        train_file=DATA / "train.jsonl.gz", validation_file=DATA / "validation.jsonl.gz", domain_column="domain"
    )
    if options.smoke:
        corpus = {name: split.select(range(60)) for name, split in corpus.items()}
    if options.checkpoint is None:
        tokenizer = train_tokenizer(corpus["train"]["text"], kind="gpt2", vocab_size=2048)
    else:
        tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    blocks = pack(corpus["train"], tokenizer, block_size=options.block_size)
    validation = split_by_domain(
        pack(corpus["validation"], tokenizer, block_size=options.block_size, domain_column="domain")
    )
    checkpoint = options.checkpoint or train_dense(blocks, tokenizer, options)
    print_perplexity("dense", AutoModelForCausalLM.from_pretrained(checkpoint), validation)

    model, found = from_dense(
        checkpoint,
        blocks,
        cse_layers="auto",
        cse_separator_token_id=end_token_id(tokenizer),  # blocks hold documents of all domains
        sample_size=2048,
        output_fit_info=True,
    )
    clarity = {layer: round(value, 2) for layer, value in found["clarity"].items()}
    print(f"experts in layers {found['cse_layers']}, where clusters are clearest: {clarity}")
    print_perplexity("start", model, validation)

    trainer = trainer_for(model, blocks, options.output_dir / "cse", options)
    every = max(options.steps // 3, 1)
    ClusterExpertsCallback(recluster_every=every).attach(trainer)
    trainer.train()
    print_perplexity("end", model, validation)
    trainer.save_model()
    tokenizer.save_pretrained(trainer.args.output_dir)


if __name__ == "__main__":
    main()
