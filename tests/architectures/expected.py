"""What is known to be different, family by family: every exception to the rules has its line here.

The tests hold each family to the rule or to its line; the docs page prints the lines.
"""

from __future__ import annotations

# Not run at all: the reason, as the error names it.
REFUSED = {
    "muse_spark": "kernels that need Metal",
    "olmo": "own forward pass fails",
}

# The cache of a common prefix is not reused: mlx-lm's own cached forward differs from the full one.
PREFIX_NOT_SHARED = {
    "phi3small": "mlx-lm adds a boolean mask to its scores, so a token sees later ones",
    "plamo3": "mlx-lm keeps one position less in its sliding window than its mask shows",
}

# The stream keeps a share of the direction after a cut of all writers (measured on tiny models).
LEAKS = {
    "gemma3n": 0.233,
    "longcat_flash": 0.0402,
    "longcat_flash_ngram": 0.0441,
    "nanbeige": 0.0636,
    "prism_hadamard_qwen35": 5e-5,
    "rwkv7": 0.0808,
}

# mlx-lm's batched caches are wrong or missing there: prompts of equal length share a batch.
EQUAL_LENGTHS = {
    "afm7",
    "baichuan_m1",
    "bailing_moe_linear",
    "deepseek_v41",
    "gemma2",
    "gpt_bigcode",
    "internlm3",
    "jamba",
    "llama4",
    "longcat_flash_ngram",
    "mamba",
    "minimax_m3_vl",
    "nemotron-nas",
    "nemotron_h",
    "nemotron_h@moe",
    "olmo_hybrid",
    "phi3small",
    "recurrent_gemma",
    "rwkv7",
}

# Blocks that their trunk reads instead of calling: there is no tap to compare with.
NO_TAP = {"iquestloopcoder"}

# `unembed` applies the final norm and the head alone there; what the family does to its logits is
# left out.
LENS = {"gemma3n": "a soft cap"}

# No module puts the whole attention or MLP side of a block out, so a change there is refused; or,
# for nanbeige, a change in the first round comes back through the norm between the rounds.
NO_SITES = {
    "deepseek_v41": "several streams",
    "falcon_h1": "adds two attention terms",
    "gemma3n": "several streams",
    "gemma4": "writes to the stream directly",
    "gemma4_text": "writes to the stream directly",
    "granitemoehybrid": "adds two mlp terms",
    "longcat_flash": "adds two attention terms",
    "longcat_flash_ngram": "adds two attention terms",
    "nanbeige": "arrives",
}

# Ten kinds of models, packed to 8 and to 4 bits.
PACKED = (
    "llama",
    "qwen3_moe",
    "gemma2",
    "gemma3_text",
    "mixtral",
    "gpt_oss",
    "deepseek_v3",
    "qwen3_next",
    "nemotron_h",
    "phi3",
)

# A few that between them meet every mechanism; the oldest admitted mlx-lm runs these alone.
SMOKE = (
    "llama",
    "gemma2",
    "gemma3n",
    "gpt2",
    "gptj",
    "mixtral",
    "deepseek_v3",
    "qwen3_next",
    "mamba2",
    "plamo",
    "afm7",
    "gpt_oss",
    "recurrent_gemma",
    "granitemoehybrid",
)
