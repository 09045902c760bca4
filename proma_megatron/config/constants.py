"""Numbers and names that two rooms must agree on; nothing is loaded for them."""

from __future__ import annotations

EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped early; everything is saved; start again with --resume

# In the environment of ranks: their exit code at a stop, for a launcher that takes 75 for a failure
# and reports it at length. Such a launcher looks for `STOPPED_FILE`.
STOP_CODE = "PROMA_STOP_CODE"
STOPPED_FILE = "stopped.json"  # in a run's logs: why it stopped early

LOGPROB_CHUNK = 4096  # tokens whose wide logits exist at one time
KEPT_ROWS = 0.75  # of a batch still decoding: below this share, finished rows leave the cache

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}  # of one entry
