# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Fixtures that several files of this folder have."""

import evidence_models
import pytest


@pytest.fixture(params=evidence_models.GATES)
def gate(request, monkeypatch):
    """Evidence models of the test are of this gate."""
    monkeypatch.setattr(evidence_models, "FLAGS", evidence_models.GATES[request.param])
    return request.param
