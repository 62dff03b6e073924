"""What a schema is made of: keys with their words, tables that refuse unknown keys.

Knows pydantic; knows no key of any configuration. `run_schema` and `study_schema` are made of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo


@dataclass(frozen=True)
class Setting:
    """What the schema says about a key beyond its type, default and description."""

    expects: str
    """What a value has to be, in words: used in errors, in the scaffold and in the reference."""
    flag: str | None = None
    """The command line's name for the key, where it has one."""
    short: str | None = None
    metavar: str | None = None
    place: Literal["model", "prompts", "file", "folder"] | None = None
    """Marks strings that are places on disk: in a TOML file they are relative to that file."""
    words: tuple[str, ...] = ()
    """Values that are no places although the key's values are."""
    example: str | None = None
    """TOML text shown, commented out, where the default is "not set"."""


_SETTING = {field.name for field in fields(Setting)}


def key(expects: str, description: str, default: Any = ..., **options: Any) -> Any:
    """A key of a `Section`; required where it has no default.

    `options` are fields of `Setting` and pydantic's limits (gt, lt, min_length ...).
    """
    words = {name: options.pop(name) for name in _SETTING & options.keys()}
    field = Field(default, description=description, **options)
    field.metadata.append(Setting(expects, **words))
    return field


class Section(BaseModel):
    """A table of the configuration: unknown keys are errors, values are not converted silently."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    def conflict(self) -> tuple[tuple[str, ...], str] | None:
        """The first key that another one rules out, and why; None where all go together."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values, keys in the order of the schema."""
        return self.model_dump(mode="json")


class HubDataset(Section):
    """A prompt set on the Hugging Face Hub, written as a table (`vauban.DatasetRef`)."""

    hf: str
    split: str = "train"
    column: str = "prompt"
    config: str | None = None
    limit: Annotated[int, Field(gt=0)] | None = None
    revision: str | None = None


Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Negative = Annotated[int, Field(lt=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Quantile = Annotated[float, Field(ge=0, lt=0.5)]
LoudMultiple = Annotated[float, Field(gt=1, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]
Prompts = Text | list[Text] | HubDataset

POSITIVE = "a whole number above 0"
NON_NEGATIVE = "a whole number, 0 or more"
BOOLEAN = "true or false"
PROMPTS = (
    "a file of prompts (JSONL, JSON, CSV, TSV, parquet, text), "
    '"default" (the bundled set), "hf:org/name", '
    "a table { hf = ... } or a list of prompts"
)


@dataclass(frozen=True)
class Key:
    """One key of the schema, as the generators see it."""

    section: str | None
    """None for a top-level key."""
    name: str
    field: FieldInfo
    setting: Setting

    @property
    def path(self) -> tuple[str, ...]:
        return (self.name,) if self.section is None else (self.section, self.name)

    @property
    def required(self) -> bool:
        return self.field.is_required()

    @property
    def default(self) -> Any:
        return None if self.required else self.field.default


def sections(schema: type[Section]) -> dict[str, type[Section]]:
    """The tables of a configuration, in order."""
    return {
        name: field.annotation
        for name, field in schema.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }


def keys(schema: type[Section]) -> Iterator[Key]:
    """Every key, top-level ones first, in the order in which they are written."""
    tables = sections(schema)
    for name, field in schema.model_fields.items():
        if name not in tables:
            yield Key(None, name, field, _setting(field))
    for section, table in tables.items():
        for name, field in table.model_fields.items():
            yield Key(section, name, field, _setting(field))


def _setting(field: FieldInfo) -> Setting:
    return next(item for item in field.metadata if isinstance(item, Setting))
