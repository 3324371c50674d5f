# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promise of one thread: it holds for NumPy, SciPy and scikit-learn inside the context, and for nobody afterwards."""

import sklearn.cluster  # noqa: F401 - loads what shall be limited
from threadpoolctl import threadpool_info, threadpool_limits

from modeling_cse.clustering.threads import one_thread


def threads() -> list[int]:
    return [library["num_threads"] for library in threadpool_info()]


def test_one_thread_inside_and_as_before_outside():
    with threadpool_limits(limits=2):
        before = threads()
        for _ in range(2):
            with one_thread():
                assert set(threads()) == {1}
            assert threads() == before
        assert max(before) == 2
