"""PROMA (Projected Microbatch Accumulation) on Megatron-Core."""

import logging
import warnings

__version__ = "0.2.0"

# Megatron-Core reports every optional kernel that is missing, once a process, at import.
warnings.filterwarnings("ignore", module=r"megatron\.")
warnings.filterwarnings("ignore", message=r"invalid escape sequence", category=SyntaxWarning)
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
logging.getLogger("megatron").setLevel(logging.ERROR)
