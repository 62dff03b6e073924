"""The one-liners: load, measure, look at a prompt, steer it, abliterate, compare.

Thin calls of the rooms to the left with their defaults; a direction may be a result object or a
raw array wherever one is asked for.
"""

from vauban.quick.geometry import Comparison, Geometry, analyze_geometry, compare
from vauban.quick.probe import Probe, Scan, probe_prompt, scan, steer_prompt
from vauban.quick.verbs import Abliteration, abliterate, evaluate, load, measure_direction

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
    "steer_prompt",
]
