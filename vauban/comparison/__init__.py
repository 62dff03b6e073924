"""What differs between two model folders, whoever wrote them, their answers, and two runs.

In reading order:
    stored_parameters  a checkpoint's parameters, read in blocks of rows
    adapter_terms      what an adapter adds to them
    changes            size, rank and direction of a change, on arrays
    tensor_changes     one parameter on both sides
    folder_settings    configuration, tokenizer, template, generation settings
    verdict            what it amounts to, in words
    folder_diff        two folders
    model_diff         two models, with their behaviour
    run_folder         the folder that a run wrote, read again
    runs               two finished runs: figures, answers in pairs
"""

from vauban.comparison.folder_diff import FolderDiff, compare_folders
from vauban.comparison.folder_settings import SettingsDiff
from vauban.comparison.model_diff import ModelDiff, check_comparable, diff_models
from vauban.comparison.run_folder import read_answers, read_run
from vauban.comparison.runs import FigurePair, RunComparison, compare_runs, shown_figure
from vauban.comparison.tensor_changes import MatrixChange
from vauban.comparison.verdict import Shared

__all__ = [
    "FigurePair",
    "FolderDiff",
    "MatrixChange",
    "ModelDiff",
    "RunComparison",
    "SettingsDiff",
    "Shared",
    "check_comparable",
    "compare_folders",
    "compare_runs",
    "diff_models",
    "read_answers",
    "read_run",
    "shown_figure",
]
