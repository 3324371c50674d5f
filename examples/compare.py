#!/usr/bin/env python
# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
Is CSE worth it on your corpus? Trains a small dense model and a small CSE model on it (same start, same batches) and
answers in one page: runs/compare/page.md, with pictures beside it.

    python examples/compare.py --train examples/data/train.jsonl.gz --validation examples/data/validation.jsonl.gz
    python examples/compare.py --train my.jsonl
    python examples/compare.py --train my.jsonl --validation my_val.jsonl --domain-column domain --seeds 3
    python examples/compare.py --train my.jsonl --smoke

The first one prints, after half an hour on a slow core, beside others (seen with version 0.1.0, whose first fit looked
at what the warm-up had read):

    worth it: yes
      The long tail (text with an expert): ratio 0.907, interval 0.896 to 0.919: a gain.
      The common text: ratio 0.996, interval 0.991 to 1.003: no difference beyond the interval.
      ...
      long tail (text with an expert)    116.61 ->   105.78  x 0.907  (0.896 to 0.919)
      common text                         98.46 ->    98.11  x 0.996  (0.991 to 1.003)
      cluster 1 (expert 0)                94.11 ->    85.26  x 0.906  (0.891 to 0.922)
      cluster 8 (expert 1)               146.44 ->   133.01  x 0.908  (0.892 to 0.925)
      ...

The same command goes on after a kill, and with more `--seeds` keeps those that are done.
"""

from modeling_cse.runs import compare


if __name__ == "__main__":
    compare()
