#!/usr/bin/env python
# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
Is CSE worth it on your corpus? Trains a small dense model and a small CSE model on it (same start, same batches) and
answers in one page: runs/compare/page.md, with pictures beside it.

    python examples/compare.py --train examples/data/train.jsonl.gz --validation examples/data/validation.jsonl.gz
    python examples/compare.py --train my.jsonl
    python examples/compare.py --train my.jsonl --validation my_val.jsonl --domain-column domain --seeds 3
    python examples/compare.py --train my.jsonl --smoke

The same command goes on after a kill, and with more `--seeds` keeps those that are done.
"""

from modeling_cse.runs import compare


if __name__ == "__main__":
    compare()
