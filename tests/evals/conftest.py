"""One thread a process: networks this small spend their time waiting for a second one."""

import torch

torch.set_num_threads(1)
