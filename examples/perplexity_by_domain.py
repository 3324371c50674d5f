#!/usr/bin/env python
# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
How well does a model predict each kind of text?

    python examples/perplexity_by_domain.py --model runs/quickstart/cse
    python examples/perplexity_by_domain.py --model runs/mine/final --data my.jsonl --domain_column source
    python examples/perplexity_by_domain.py --smoke

Prints a line a domain, after `make quickstart`:

    general      114.83 perplexity    17085 tokens     6% of them to experts
    legal        101.07 perplexity    21165 tokens    97% of them to experts
    medical      152.85 perplexity    20145 tokens    98% of them to experts

A dense model, as runs/quickstart/dense, has lines without the last column.
"""

from pathlib import Path

from small_model import has_experts, model_of, parser_for
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator

from modeling_cse.data import load_corpus, pack, split_by_domain
from modeling_cse.evaluation import PerplexityByDomain, expert_shares, sequence_losses


DATA = Path(__file__).parent / "data" / "validation.jsonl.gz"


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument(
        "--data",
        default=str(DATA),
        help="held-out text: txt, json(l), csv or parquet, gz too; or a folder of txt files",
    )
    parser.add_argument("--domain_column", default="domain")
    parser.add_argument("--block_size", type=int, default=256)
    options = parser.parse_args()

    folder = model_of(options)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = load_corpus(train_file=options.data, validation_file=options.data, domain_column=options.domain_column)
    blocks = pack(
        text["validation"], tokenizer, block_size=options.block_size, domain_column=options.domain_column
    )
    for domain, own in split_by_domain(blocks).items():
        loader = DataLoader(own, batch_size=16, collate_fn=default_data_collator)
        metric = PerplexityByDomain()
        losses, tokens = sequence_losses(model, loader, shift=True)
        metric.add_batch(predictions=losses.tolist(), references=tokens.tolist(), domains=[domain] * len(tokens))
        line = f"{domain:<10} {metric.compute()['perplexity']:>8.2f} perplexity {tokens.sum():>8} tokens"
        if has_experts(model.config):
            line += f" {sum(expert_shares(model, loader)):>6.0%} of them to experts"
        print(line)


if __name__ == "__main__":
    main()
