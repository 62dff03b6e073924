"""The one-liners: load, measure, look at a prompt, steer it, abliterate, evaluate, compare.

Each calls other rooms with their defaults; a direction may be a result object or a raw array.

In reading order:
    abliterate          load, measure, abliterate, evaluate with the prompt sets a model brings
    inspect_direction   probe, scan and steer prompts along a direction; compare two directions
"""

from vauban.directions import Geometry, analyze_geometry
from vauban.quick.abliterate import Abliteration, abliterate, evaluate, load, measure_direction
from vauban.quick.inspect_direction import (
    Comparison,
    Probe,
    Scan,
    compare,
    probe_prompt,
    scan,
    scan_tokens,
    steer_prompt,
)

__all__ = [
    "Abliteration",
    "Comparison",
    "Geometry",
    "Probe",
    "Scan",
    "abliterate",
    "analyze_geometry",
    "compare",
    "evaluate",
    "load",
    "measure_direction",
    "probe_prompt",
    "scan",
    "scan_tokens",
    "steer_prompt",
]
