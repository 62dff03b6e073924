"""The schemas of runs and studies: TOML files, validation, scaffolds, flags, reference."""

from vauban.config.load import is_study, load_config, load_study, looks_like_hub_id, make_config
from vauban.config.scaffold import reference, scaffold, write_scaffold
from vauban.config.schema import RunConfig
from vauban.config.settings import HubDataset
from vauban.config.study import StudyConfig

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
