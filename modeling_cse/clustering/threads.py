# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""One thread for everything that has to repeat to the bit."""

from contextlib import AbstractContextManager
from functools import cache

from threadpoolctl import ThreadpoolController


@cache
def _controller() -> ThreadpoolController:
    # To look through all libraries of the process takes 5 ms, and a fit did so a dozen times. All that compute here
    # (NumPy, SciPy, scikit-learn) have been loaded before the first call.
    return ThreadpoolController()


def one_thread() -> AbstractContextManager:
    """A context in which NumPy, SciPy and scikit-learn use one thread: with several, sums are added in the order in
    which threads finish, and runs would not repeat."""
    return _controller().limit(limits=1)
