"""The schemas of runs and studies: TOML files, validation, scaffolds, flags, reference.

In reading order:
    keys           what a schema is made of: a key with its words, sections
    run_schema     the keys of a run
    study_schema   the keys of a study
    edit_schema    the keys of an edit of facts
    load           TOML or flags in, a checked configuration out
    scaffold       the annotated file of `vauban init`, and the reference page
"""

from vauban.config.edit_schema import EditConfig
from vauban.config.keys import HubDataset
from vauban.config.load import (
    is_edit,
    is_study,
    load_config,
    load_edit,
    load_study,
    looks_like_hub_id,
    make_config,
    make_edit,
)
from vauban.config.run_schema import RunConfig
from vauban.config.scaffold import reference, scaffold, write_scaffold
from vauban.config.study_schema import StudyConfig

__all__ = [
    "EditConfig",
    "HubDataset",
    "RunConfig",
    "StudyConfig",
    "is_edit",
    "is_study",
    "load_config",
    "load_edit",
    "load_study",
    "looks_like_hub_id",
    "make_config",
    "make_edit",
    "reference",
    "scaffold",
    "write_scaffold",
]
