#!/usr/bin/env python
# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
What is each expert for? Its share of the text, known domains, telling words and a typical text.

    python examples/look_at_experts.py --model runs/quickstart/cse
    python examples/look_at_experts.py --model runs/mine/final --data my.jsonl --text_column body --domain_column field
    python examples/look_at_experts.py --smoke

Prints, after `make quickstart`, among others:

    expert 0      9% of the texts: legal 100%
        court, case, trial, see, mexico, section, evidence, defendant, state, was
        at 904; see also Loder v. Municipal Court, 17 Cal.3d 859, 132 Cal.Rptr. 464, 476-77, 553 P.2d 624, ...
    expert 2      7% of the texts: medical 97%, general 3%
        symptoms, blood, what, body, treatment, disease, condition, affected, disorder, syndrome
        causes Coffin-Siris syndrome? Coffin-Siris syndrome is caused by a change (mutation) in either the ...
"""

from pathlib import Path

from small_model import model_of, parser_for
from transformers import AutoModel, AutoTokenizer

from modeling_cse import describe_experts
from modeling_cse.data import load_corpus
from modeling_cse.hub import COMMON


DATA = Path(__file__).parent / "data" / "train.jsonl.gz"


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument(
        "--data",
        default=str(DATA),
        help="text: txt, json(l), csv or parquet, gz too; or a folder of txt files",
    )
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--domain_column", default="domain", help="names a text's domain, where the data has it")
    parser.add_argument("--most", type=int, default=512, help="texts to look at")
    options = parser.parse_args()

    folder = model_of(options)
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    files = {"train_file": options.data, "validation_file": options.data}
    texts = load_corpus(**files, text_column=options.text_column)["train"]
    if options.domain_column not in ("domain", *texts.column_names):
        raise SystemExit(f"--domain_column {options.domain_column}: there is none, only {texts.column_names}.")
    columns = {"text_column": options.text_column, "domain_column": options.domain_column}
    found = describe_experts(model, tokenizer, texts, **columns, most=options.most)
    for expert in found:
        name = "no expert" if expert.expert == COMMON else f"expert {expert.expert}"
        domains = ", ".join(f"{domain} {part:.0%}" for domain, part in expert.domains.items())
        print(f"{name:<10} {expert.share:>5.0%} of the texts{': ' * bool(domains)}{domains}")
        print(f"    {', '.join(expert.terms) or '(no telling words)'}")
        print(f"    {expert.typical}")


if __name__ == "__main__":
    main()
