"""Prompts: files and bundled sets, Hub data sets, and the one way to token ids and back.

Knows no model and no arrays. In reading order:
    records     the rows of a prompt file, in every format
    conversations  prompts of several messages, checked
    sets        prompt files, the bundled sets, the sets that a model's folder names
    sources     any way of naming prompts, Hub data sets included
    texts       texts and answered requests for perplexity
    chat        a prompt or conversation to token ids
    positions   the template's tokens and the user's
    reasoning   reasoning blocks in prompts and answers
"""

from vauban.prompts.chat import (
    conversation_text,
    encode_chat,
    has_chat_template,
    template_variables,
    use_system_prompt,
    use_template_args,
)
from vauban.prompts.conversations import Conversation, Turn, checked_messages
from vauban.prompts.positions import common_prefix, instruction_end, post_instruction_positions
from vauban.prompts.reasoning import (
    decode_answer,
    open_reasoning,
    reasoning_marks,
    split_reasoning,
    strip_thinking,
)
from vauban.prompts.records import file_rows, read_objects
from vauban.prompts.sets import (
    LabelledPrompt,
    ModelPrompts,
    checked_prompt,
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
    "Conversation",
    "DatasetRef",
    "LabelledPrompt",
    "ModelPrompts",
    "Turn",
    "answer_chats",
    "checked_messages",
    "checked_prompt",
    "common_prefix",
    "conversation_text",
    "decode_answer",
    "default_eval_path",
    "default_preservation_path",
    "default_prompt_paths",
    "default_surface_path",
    "default_texts_path",
    "encode_chat",
    "file_rows",
    "has_chat_template",
    "instruction_end",
    "load_labelled_prompts",
    "load_prompts",
    "load_texts",
    "measuring_paths",
    "model_prompt_sets",
    "open_reasoning",
    "post_instruction_positions",
    "read_objects",
    "reasoning_marks",
    "resolve_prompts",
    "split_reasoning",
    "spread",
    "strip_thinking",
    "template_variables",
    "use_system_prompt",
    "use_template_args",
]
