"""The schemas of runs and studies: TOML files, validation, scaffolds, flags, reference.

In reading order:
    keys           what a schema is made of: a key with its words, sections
    run_schema     the keys of a run
    study_schema   the keys of a study
    load           TOML or flags in, a checked configuration out
    scaffold       the annotated file of `vauban init`, and the reference page
"""

from vauban.config.keys import HubDataset
from vauban.config.load import is_study, load_config, load_study, looks_like_hub_id, make_config
from vauban.config.run_schema import RunConfig
from vauban.config.scaffold import reference, scaffold, write_scaffold
from vauban.config.study_schema import StudyConfig

__all__ = [
    "HubDataset",
    "RunConfig",
    "StudyConfig",
    "is_study",
    "load_config",
    "load_study",
    "looks_like_hub_id",
    "make_config",
    "reference",
    "scaffold",
    "write_scaffold",
]
