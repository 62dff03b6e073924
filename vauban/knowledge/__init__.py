"""Facts and how a model is made to hold others: keys, values, updates, a ledger.

In reading order:

facts         facts, and the files that hold them
post_norms    what a matrix must put out for the norm behind it
layers        the matrices that hold facts
key_stats     the second moment of a layer's keys
penalty       what an update pays for, and what it may not touch
updates       ridge with history, ROME, EMMET
filters       RECT, PRUNE, SPHERE, projection
tokens        where the subject ends; targets and contexts
reading       keys, and the stream at the subject's last token
values        what the stream should be, for the model to say the target
tasks         what their training is given: contexts, and what is to stay
tracing       which layers to edit
ledger        settings, and what was edited, saved
update_factors  one layer's update by method, as thin factors
weights       the edited matrices over a sequence
fact_report   what an edit reports
editor        edit and undo, batch after batch
conveniences  its methods that call what lies to the right
"""

from vauban.knowledge.editor import Editor
from vauban.knowledge.fact_report import FactOutcome, FactReport, LayerOutcome
from vauban.knowledge.facts import Fact, check_batch, load_facts
from vauban.knowledge.filters import projected, prune, rect, sphere
from vauban.knowledge.key_stats import KeyStats, collect_key_stats
from vauban.knowledge.layers import EditedModule, edited_modules
from vauban.knowledge.ledger import LEDGER_FILE, EditSettings, Ledger
from vauban.knowledge.penalty import Penalty, penalty, protected_directions
from vauban.knowledge.reading import context_keys, read_facts
from vauban.knowledge.tokens import encode_fact, sample_contexts, target_ids
from vauban.knowledge.tracing import trace_layers, tracing_effects
from vauban.knowledge.updates import emmet_update, ridge_update, rome_update
from vauban.knowledge.values import Value, ValueSettings, ValueTask, optimise_values

__all__ = [
    "LEDGER_FILE",
    "EditSettings",
    "EditedModule",
    "Editor",
    "Fact",
    "FactOutcome",
    "FactReport",
    "KeyStats",
    "LayerOutcome",
    "Ledger",
    "Penalty",
    "Value",
    "ValueSettings",
    "ValueTask",
    "check_batch",
    "collect_key_stats",
    "context_keys",
    "edited_modules",
    "emmet_update",
    "encode_fact",
    "load_facts",
    "optimise_values",
    "penalty",
    "projected",
    "protected_directions",
    "prune",
    "read_facts",
    "rect",
    "ridge_update",
    "rome_update",
    "sample_contexts",
    "sphere",
    "target_ids",
    "trace_layers",
    "tracing_effects",
]
