#!/usr/bin/env python
# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
Pretrain a BERT with cluster-guided sparse experts on mixed-domain text.

    python examples/run_mlm.py configuration/recipes/quickstart_bert.yaml
    python examples/run_mlm.py configuration/recipes/quickstart_bert.yaml --smoke   # eight steps of it
    python examples/run_mlm.py --config_name configuration/cse-bert-110m --train_file corpus.jsonl \
        --tokenizer_name google-bert/bert-base-uncased --domain_column domain --max_seq_length 128 \
        --output_dir runs/bert

Flags are those of transformers' run_mlm.py, with the groups "clusters" and "cse_*" added; a recipe (YAML) holds any of
them, and flags behind it win.
"""

from modeling_cse.runs import BERT, pretrain


if __name__ == "__main__":
    pretrain(BERT)
