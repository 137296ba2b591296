import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that plain `pytest` finds the modules in the root
torch.set_num_threads(1)  # the tensors here are small: more threads would only wait for each other

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it while the kernel is defined
    import monoids  # noqa: F401

    del os.environ["TRITON_INTERPRET"]
