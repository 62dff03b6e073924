"""Sets of prompts on a model: batches over a common prefix, and answers under interventions.

In reading order:
    batching         sets of prompts in batches over a common prefix; read again from a block on
    prompt_reading   residuals of prompts, from the pass that generation starts with
    decoding         one batch, from its caches to its last token
    uneven           whether rows of uneven length may share a batch
    generate         answers, batched, under interventions; several changes in one batch
"""

from vauban.generation.batching import (
    TOKEN_BUDGET,
    PromptReader,
    SharedPrefix,
    batches,
    can_skip_blocks,
    entering,
    measuring_bytes,
    prefix_cache,
    repeated,
    shared_prefix,
    token_budget,
)
from vauban.generation.generate import decode, eos_ids, generate, generate_groups, generate_tokens
from vauban.generation.prompt_reading import PromptReading, can_read_prompts

__all__ = [
    "TOKEN_BUDGET",
    "PromptReader",
    "PromptReading",
    "SharedPrefix",
    "batches",
    "can_read_prompts",
    "can_skip_blocks",
    "decode",
    "entering",
    "eos_ids",
    "generate",
    "generate_groups",
    "generate_tokens",
    "measuring_bytes",
    "prefix_cache",
    "repeated",
    "shared_prefix",
    "token_budget",
]
