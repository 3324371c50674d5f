# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What the tests of pictures share."""

import pytest
from matplotlib.figure import Figure


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that are saved, to look at what is in them."""
    figures, save = [], Figure.savefig

    def keep_and_save(figure: Figure, *args, **kwargs) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep_and_save)
    return figures
