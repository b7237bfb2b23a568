"""The models of these tests are so small that more threads only get in each other's way."""

import torch

torch.set_num_threads(1)
