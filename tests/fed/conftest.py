# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Counts of random inputs are written when all tests are through."""

from outcomes import write_counts


def pytest_sessionfinish(session):
    write_counts(map(str, session.config.invocation_params.args))
