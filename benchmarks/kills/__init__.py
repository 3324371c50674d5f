# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Runs that are killed with SIGKILL, and must go on as if nothing had been: `python -m benchmarks.kills`."""
