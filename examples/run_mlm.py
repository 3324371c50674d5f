#!/usr/bin/env python
# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
Pretrain a BERT with cluster-guided sparse experts on mixed-domain text.

    python examples/run_mlm.py configuration/recipes/quickstart_bert.yaml
    python examples/run_mlm.py configuration/recipes/quickstart_bert.yaml --smoke   # eight steps of it
    python examples/run_mlm.py --config_name configuration/cse-bert-110m --train_file corpus.jsonl \
        --tokenizer_name google-bert/bert-base-uncased --domain_column domain --max_seq_length 128 \
        --output_dir runs/bert

The first one ends with a table, a picture and a model card (in bf16). In 600 steps a masked model learns little more
than word frequencies; experts learn those of their domain:

    | validation perplexity | cse | dense | cse / dense |
    | general | 375.87 | 380.09 | 0.989 |
    | legal | 376.23 | 487.68 | 0.771 |
    | medical | 436.20 | 522.62 | 0.835 |
    routes:   share of tokens that go to experts  general 9.5%, legal 100.0%, medical 100.0%

Flags are those of transformers' run_mlm.py, with the groups "clusters" and "cse_*" added; a recipe (YAML) holds any of
them, and flags behind it win.
"""

from modeling_cse.runs import BERT, pretrain


if __name__ == "__main__":
    pretrain(BERT)
