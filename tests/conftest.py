"""The models of these tests are so small that more threads only get in each other's way."""

import torch
from hypothesis import settings

torch.set_num_threads(1)

# The same examples on every machine and in every run; a slow machine is no failure.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")
