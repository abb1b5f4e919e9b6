"""Import this module to keep PyTorch out of the process: tokenizers do not need it, and its import takes seconds."""

import os
import sys

# Without PyTorch, transformers would print a warning.
sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
