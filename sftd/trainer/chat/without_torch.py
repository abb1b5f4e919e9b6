"""Importing this module keeps PyTorch out of the process: tokenizers do not need it, and loading it takes seconds."""

import os
import sys

# transformers looks whether PyTorch could be imported, and would say that it cannot.
sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
