"""The study of difference in means against INLP: interventions x scopes, matched, on any model."""

from vauban.study.run import StudyResult, run_study

__all__ = ["StudyResult", "run_study"]
