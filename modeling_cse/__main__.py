# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
Runs somebody else's script or module with this package imported, so that `cse_gpt2` and `cse_bert` are known there:

    python -m modeling_cse run_clm.py --model_type cse_gpt2 --config_overrides n_embd=256,n_layer=6 ...
    python -m modeling_cse -m lm_eval run --model hf --model_args pretrained=runs/mine/final ...

transformers has no plugins: without an import it knows these models only by `trust_remote_code=True`.
"""

import runpy
import sys
from pathlib import Path


USAGE = "usage: python -m modeling_cse (SCRIPT | -m MODULE) [ARGUMENTS ...]"


def main(arguments: list[str]) -> None:
    """
    Runs a script or a module as `python` would, with `sys.argv` as it expects.

    Args:
        arguments: the script and its arguments; or `-m`, the module and its arguments.

    Raises:
        SystemExit: there is nothing to run.
    """
    named = arguments[:1] == ["-m"]
    rest = arguments[1:] if named else arguments
    if not rest or rest[0].startswith("-"):
        raise SystemExit(USAGE)
    if named:
        sys.argv = rest
        sys.path[0] = str(Path.cwd())
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    if not Path(rest[0]).is_file():
        raise SystemExit(f"{USAGE}\n{rest[0]!r} is not a file.")
    sys.argv = rest
    sys.path[0] = str(Path(rest[0]).resolve().parent)  # a script finds its neighbours
    runpy.run_path(rest[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
