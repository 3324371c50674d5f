# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Speed and memory of models with cluster experts beside a dense twin and two opponents."""
