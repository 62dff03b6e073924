"""Direction-exact rounding of one packed matrix: NumPy arrays in and out, no model, no file.

In reading order:

grid                number grids of the packed formats, packing, scales for a group
problem             what is asked of a matrix: a target, a grid, and U Ŵ
exact               round the codes of a column, or row, so that their weighted sum is exact
second_moment       what a matrix reads: E[x xᵀ] as a sketch
gptq                a matrix, column by column, errors made good by later columns
coordinate_descent  a table, row by row
"""

from vauban.rounding.coordinate_descent import round_table
from vauban.rounding.gptq import orthonormal, round_matrix, shifted_target
from vauban.rounding.grid import fresh_grid, fresh_is_better, grid_of, pack, scale_values
from vauban.rounding.problem import Axis, Problem, problem
from vauban.rounding.second_moment import Energy, InputMoments

__all__ = [
    "Axis",
    "Energy",
    "InputMoments",
    "Problem",
    "fresh_grid",
    "fresh_is_better",
    "grid_of",
    "orthonormal",
    "pack",
    "problem",
    "round_matrix",
    "round_table",
    "scale_values",
    "shifted_target",
]
