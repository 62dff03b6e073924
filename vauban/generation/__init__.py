"""Sets of prompts on a model: batches over a common prefix, and answers under interventions.

In reading order:
    batching         sets of prompts in batches over a common prefix; read again from a block on
    prompt_reading   residuals of prompts, from the pass that generation starts with
    decoding         rows from their caches to their last tokens; who is done makes room
    uneven           whether rows of uneven length may share a batch, and join one later
    generate         answers, batched, under interventions; several changes in one batch
"""

from vauban.generation.batching import (
    TOKEN_BUDGET,
    Batches,
    PromptReader,
    SharedPrefix,
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
    "Batches",
    "PromptReader",
    "PromptReading",
    "SharedPrefix",
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
