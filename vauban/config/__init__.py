"""One schema for a run: its TOML file, its validation, its scaffold, its flags, its reference."""

from vauban.config.load import load_config, looks_like_hub_id, make_config
from vauban.config.scaffold import reference, scaffold, write_scaffold
from vauban.config.schema import HubDataset, RunConfig

__all__ = [
    "HubDataset",
    "RunConfig",
    "load_config",
    "looks_like_hub_id",
    "make_config",
    "reference",
    "scaffold",
    "write_scaffold",
]
