"""Estimators, the measured direction as a value, layer scores, layer choice, causal selection."""

from vauban.directions.candidates import Candidates, collect_candidates
from vauban.directions.causal import select_direction
from vauban.directions.classifiers import fit_classifier
from vauban.directions.estimators import Direction, fit_mean_difference
from vauban.directions.geometry import Geometry, analyze_geometry, principal_angles
from vauban.directions.inlp import INLPResult, fit_inlp, fit_inlp_batch
from vauban.directions.layers import select_target_layers
from vauban.directions.leace import (
    LeaceResult,
    OracleResult,
    fit_leace,
    fit_mean_projection,
    fit_oracle,
    fit_splince,
)
from vauban.directions.measure import measure, residual_limit
from vauban.directions.median import fit_geometric_median, geometric_median
from vauban.directions.pca import Subspace, fit_pca
from vauban.directions.refusal_odds import refusal_log_odds, refusal_token_ids
from vauban.directions.result import DirectionResult
from vauban.directions.selection import NoCandidate, SelectionResult, select_from_scores
from vauban.directions.subspace import SubspaceResult, measure_subspace

__all__ = [
    "Candidates",
    "Direction",
    "DirectionResult",
    "Geometry",
    "INLPResult",
    "LeaceResult",
    "NoCandidate",
    "OracleResult",
    "SelectionResult",
    "Subspace",
    "SubspaceResult",
    "analyze_geometry",
    "collect_candidates",
    "fit_classifier",
    "fit_geometric_median",
    "fit_inlp",
    "fit_inlp_batch",
    "fit_leace",
    "fit_mean_difference",
    "fit_mean_projection",
    "fit_oracle",
    "fit_pca",
    "fit_splince",
    "geometric_median",
    "measure",
    "measure_subspace",
    "principal_angles",
    "refusal_log_odds",
    "refusal_token_ids",
    "residual_limit",
    "select_direction",
    "select_from_scores",
    "select_target_layers",
]
