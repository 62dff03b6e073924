"""vauban measures, edits and evaluates concept directions in open-weight language models on MLX.

This file only re-exports, lazily: `import vauban` loads neither mlx-lm nor transformers.
"""

import importlib
from typing import Any

from vauban._backend import prefer_openblas

prefer_openblas()

__version__ = "0.1.0"

# name -> the module that defines it; one line a room, in the order of the data's way.
_EXPORTS = {
    "vauban.errors": "VaubanError InputError ModelError ArchitectureError CheckError VaubanWarning",
    "vauban.prompts": (
        "DatasetRef default_eval_path default_preservation_path default_prompt_paths "
        "default_surface_path encode_chat load_labelled_prompts load_prompts load_texts "
        "post_instruction_positions resolve_prompts"
    ),
    "vauban.interventions": (
        "SITES Ablate AblateTo Add Conditional Erase Flip Intervention Patch Project"
    ),
    "vauban.models": (
        "ForwardCheck ForwardOutput ModelInfo Writer describe forward load organism_path "
        "residual_writers unembed verify_forward"
    ),
    "vauban.generation": "generate",
    "vauban.activations": "ActivationMoments Activations collect_activations winsorize",
    "vauban.directions": (
        "Direction DirectionResult INLPResult LeaceResult SelectionResult SubspaceResult "
        "analyze_geometry collect_candidates fit_classifier fit_geometric_median fit_inlp "
        "fit_leace fit_masked_difference fit_mean_difference fit_mean_projection fit_pca "
        "fit_scaled_difference fit_splince geometric_median measure_subspace "
        "principal_angles refusal_log_odds refusal_token_ids select_direction select_from_scores "
        "select_target_layers"
    ),
    "vauban.edits": (
        "EditPlan NullSpace PreservationKeys Preserve SparseDirectionSurgeon "
        "SparseProjectionResult SparseSurgeryPlan collect_preservation_keys cut cut_biprojected "
        "cut_subspace null_space plan_cut protection_report quantize_direction_exact "
        "sparsify_direction"
    ),
    "vauban.knowledge": (
        "EditSettings Editor Fact FactReport KeyStats Ledger Penalty collect_key_stats "
        "emmet_update load_facts penalty prune rect ridge_update rome_update sphere"
    ),
    "vauban.evaluation": (
        "DEFAULT_REFUSAL_PHRASES Behaviour Capability EvalResult FactEval Gate GateReport "
        "HiddenShift Likelihood LocalJudge OffTarget PairedResult SurfaceComparison "
        "SurfacePrompt SurfaceScan Verdict agreement bootstrap_interval check_gates "
        "classify_answer compare_answers compare_likelihood compare_surfaces evaluate "
        "evaluate_facts hidden_shift is_degenerate is_refusal judge_answers kl_divergence "
        "load_surface_prompts measure_behaviour measure_capability measure_harmfulness "
        "measure_off_target measure_perplexity paired_test perplexity scan_surface "
        "wilson_interval"
    ),
    "vauban.search": (
        "AnswerChoice KernelSpace SearchResult SearchSpace Strength StrengthChoice StrengthKernel "
        "Trial choose_by_answers choose_strength measure"
    ),
    "vauban.export": "ExportReport export_control_vector export_model verify_export",
    "vauban.comparison": (
        "FolderDiff ModelDiff RunComparison compare_folders compare_runs diff_models"
    ),
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names.split()}
# A room that is called like its function; the module can be called (see its file).
_CALLABLE = ("search",)
__all__ = sorted([*_HOME, *_CALLABLE])


def __getattr__(name: str) -> Any:
    if name in _CALLABLE:
        return importlib.import_module(f"vauban.{name}")
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'vauban' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
