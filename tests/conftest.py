"""The models of these tests are so small that more threads only get in each other's way; and weight files that lie in
other programs' folders of this machine are none of theirs."""

import os

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
os.environ.update(HF_HUB_CACHE=os.devnull, TORCH_HOME=os.devnull)

# The same examples on every machine and in every run; a slow machine is no failure.
settings.register_profile("fixed", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fixed")
