# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What a forward pass leaves for the modules below it, whose stock `forward`s have no argument for it."""

from threading import get_ident
from typing import Any

import torch


class PerThread:
    """
    A value for each thread, from `put` to `drop`. Threads that share a model (a server's) do not read each other's,
    and the copies that `nn.DataParallel` makes of a module, which share this object, run in threads of their own.

    What is compiled knows no threads, and asks for the value that was put last: its graph keeps it as its own.
    """

    def __init__(self):
        self.values: dict[int, Any] = {}
        self.last: Any = None

    def put(self, value: Any) -> None:
        """Leaves a value, in the place of the thread's last one."""
        self.last = value
        if not torch.compiler.is_compiling():
            self.values[get_ident()] = value

    def get(self) -> Any:
        """The thread's value; None where it has none."""
        return self.last if torch.compiler.is_compiling() else self.values.get(get_ident())

    def drop(self) -> None:
        """Forgets it: what stays behind would hold its memory, and mix with what is traced next."""
        self.last = None
        if not torch.compiler.is_compiling():
            self.values.pop(get_ident(), None)


__all__ = ["PerThread"]
