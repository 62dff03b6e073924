"""From activations to directions: estimators on arrays, the measured direction, its choice.

In reading order:
    loud_coordinates  which coordinates of the stream stand out, and what they do
    mean_estimators   directions from the moments of two classes: plain, masked, scaled
    estimators        a fitted `Direction`, and the same estimators on rows
    median            the geometric median, which outliers hardly move
    pca               principal components of the paired differences, and others
    classifiers       logistic regression, SVM and LDA as directions
    inlp              iterative null-space projection: classifier after classifier
    leace             least-squares concept erasure in closed form
    class_moments     the two classes read once, with a held-out part
    separation        how well projections tell the classes apart
    result            `DirectionResult`: what was measured, saved and loaded
    direction_files   the file format of results
    measure           the direction at every layer, and the layer's choice
    subspace          several directions at one layer
    candidates        raw differences at all positions and residuals
    refusal_odds      the first answer token: refusal log-odds and KL
    selection_rule    the published rule on scores alone
    causal            scores by running each candidate's cut
    target_layers     which blocks to cut, from scores per layer
    geometry          angles between directions and subspaces
"""

from vauban.directions.candidates import Candidates, collect_candidates
from vauban.directions.causal import select_direction
from vauban.directions.classifiers import fit_classifier
from vauban.directions.estimators import (
    Direction,
    fit_masked_difference,
    fit_mean_difference,
    fit_scaled_difference,
)
from vauban.directions.geometry import Geometry, analyze_geometry, principal_angles
from vauban.directions.inlp import INLPResult, fit_inlp, fit_inlp_batch
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
from vauban.directions.selection_rule import NoCandidate, SelectionResult, select_from_scores
from vauban.directions.subspace import SubspaceResult, measure_subspace
from vauban.directions.target_layers import select_target_layers

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
    "fit_masked_difference",
    "fit_mean_difference",
    "fit_mean_projection",
    "fit_oracle",
    "fit_pca",
    "fit_scaled_difference",
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
