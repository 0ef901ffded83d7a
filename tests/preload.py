"""What the server of forked ranks imports in addition to libraries: the project itself."""

import torch

torch.set_num_threads(1)

from swiftmeg import upstream  # noqa: E402, F401
from swiftmeg.data.sources import load  # noqa: E402, F401
