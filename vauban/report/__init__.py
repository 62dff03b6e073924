"""A run's figures for people, as text and data.

In reading order:
    figures      numbers, intervals, sizes and shortened answers as text
    table        the before/after table
    verdict_table  five verdicts, pairs, length curve
    samples      the answers that are shown
    source_card  what a source model's card hands on
    card         the model card
    edit_card    the model card of edited facts
    shift_plot   the picture of a hidden shift
    surface_plot  heat maps of a refusal surface
    html_charts  the report's charts as SVG
    html_tables  its tables of candidates and strengths
    html         the report of a run: one HTML file (page.html is its template)
"""

from vauban.report.card import model_card, refusal_statement
from vauban.report.edit_card import fact_card
from vauban.report.figures import (
    byte_size,
    decimal,
    json_safe,
    percent,
    quantity,
    rate_with_interval,
    seconds,
    shorten,
    written_cut,
)
from vauban.report.html import html_report, write_report
from vauban.report.samples import Sample, pick_samples
from vauban.report.shift_plot import plot_shift
from vauban.report.source_card import source_card
from vauban.report.surface_plot import plot_surface
from vauban.report.table import (
    HEADINGS,
    LEGEND,
    BehaviourRow,
    Share,
    aligned,
    cells,
    contrast_line,
    interval_lines,
    markdown_row,
    markdown_table,
    plain_table,
)
from vauban.report.verdict_table import off_target_sentence, verdict_lines, verdict_markdown

__all__ = [
    "HEADINGS",
    "LEGEND",
    "BehaviourRow",
    "Sample",
    "Share",
    "aligned",
    "byte_size",
    "cells",
    "contrast_line",
    "decimal",
    "fact_card",
    "html_report",
    "interval_lines",
    "json_safe",
    "markdown_row",
    "markdown_table",
    "model_card",
    "off_target_sentence",
    "percent",
    "pick_samples",
    "plain_table",
    "plot_shift",
    "plot_surface",
    "quantity",
    "rate_with_interval",
    "refusal_statement",
    "seconds",
    "shorten",
    "source_card",
    "verdict_lines",
    "verdict_markdown",
    "write_report",
    "written_cut",
]
