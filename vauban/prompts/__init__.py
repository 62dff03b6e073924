"""Prompts: sets and files, sources such as Hub data sets, and the one way to token ids.

The first room of the house: it knows no model and no arrays.
"""

from vauban.prompts.chat import (
    common_prefix,
    conversation_text,
    encode_chat,
    has_chat_template,
    post_instruction_positions,
)
from vauban.prompts.reasoning import (
    decode_answer,
    open_reasoning,
    split_reasoning,
    strip_thinking,
)
from vauban.prompts.sets import (
    LabelledPrompt,
    ModelPrompts,
    default_eval_path,
    default_preservation_path,
    default_prompt_paths,
    default_surface_path,
    load_labelled_prompts,
    load_prompts,
    measuring_paths,
    model_prompt_sets,
    spread,
)
from vauban.prompts.sources import DatasetRef, resolve_prompts
from vauban.prompts.texts import ALPACA, PILE, answer_chats, default_texts_path, load_texts

__all__ = [
    "ALPACA",
    "PILE",
    "DatasetRef",
    "LabelledPrompt",
    "ModelPrompts",
    "answer_chats",
    "common_prefix",
    "conversation_text",
    "decode_answer",
    "default_eval_path",
    "default_preservation_path",
    "default_prompt_paths",
    "default_surface_path",
    "default_texts_path",
    "encode_chat",
    "has_chat_template",
    "load_labelled_prompts",
    "load_prompts",
    "load_texts",
    "measuring_paths",
    "model_prompt_sets",
    "open_reasoning",
    "post_instruction_positions",
    "resolve_prompts",
    "split_reasoning",
    "spread",
    "strip_thinking",
]
