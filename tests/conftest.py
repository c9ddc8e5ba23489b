"""What has to be set before anything is imported."""

import os

import torch

# Triton decides as it is imported, by whichever test comes first, whether kernels are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
