"""Names that a configuration may give, and what goes with each; no function is loaded for it."""

from __future__ import annotations

# What each algorithm may do while gradients accumulate; the first is its default.
RULES: dict[str, tuple[str, ...]] = {
    "proma": ("exact", "iterative", "ridge", "none"),
    "intra_proma": ("subspace",),
    "isopo": ("kernel", "norm"),
}


# Clipping ranges (low, high) where the configuration leaves them open. PPO's and GRPO's 0.2; GSPO's
# from its section 5.1 (arXiv:2507.18071); CISPO (arXiv:2506.13585) clips above only.
CLIPS = {"gspo": (3e-4, 4e-4), "cispo": (1.0, 0.2)}


# As in the papers of those three; the others are means over tokens, as in PROMA's published runs.
AGGREGATIONS = {"gspo": "sequence_mean", "dr_grpo": "sequence_sum"}


CLIPPED = ("ppo", "grpo", "dr_grpo", "gspo")  # on one side for each sign of the advantage
