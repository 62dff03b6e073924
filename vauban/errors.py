"""The one exception family of vauban, and how values are shown in its messages.

Every message says what was given, what was expected and what to do about it.
"""


class VaubanError(Exception):
    """Base of every error that vauban raises on purpose.

    >>> import vauban
    >>> try:
    ...     vauban.load_prompts("nowhere.jsonl")
    ... except vauban.VaubanError as error:  # any of the family
    ...     print(type(error).__name__)
    InputError
    """


class InputError(VaubanError):
    """A file, an argument or an option is not what it has to be. The command line exits with 2.

    >>> import vauban
    >>> vauban.wilson_interval(5, 3)
    Traceback (most recent call last):
        ...
    vauban.errors.InputError: k = 5, n = 3; expected 0 <= k <= n
    """


class ModelError(InputError):
    """A model folder that cannot be used: missing or broken files, NaN weights, unknown type.

    >>> import tempfile, vauban
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     try:
    ...         vauban.load(folder)
    ...     except vauban.ModelError as error:
    ...         print("config.json" in str(error))
    True
    """


class ArchitectureError(VaubanError):
    """The model cannot be walked or cut correctly; refusing is better than a wrong number.

    >>> import mlx.nn as nn, vauban
    >>> try:
    ...     vauban.residual_writers(nn.Linear(2, 2))
    ... except vauban.ArchitectureError:
    ...     print("a single matrix is no language model")
    a single matrix is no language model
    """


class CheckError(VaubanError):
    """A check after the work failed: what was written is not what was meant. Exit code 1.

    >>> import mlx.core as mx, vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> answers = vauban.generate(model, tokenizer, ["Hi"], max_tokens=1)
    >>> model.model.norm.weight = mx.full(128, float("nan"))
    >>> try:
    ...     vauban.compare_likelihood(model, tokenizer, ["Hi"], ["Hello."])
    ... except vauban.CheckError as error:
    ...     print(str(error).split(" on ")[0])
    the logits of the original model are not finite
    """


class VaubanWarning(UserWarning):
    """Something the user should know, said once.

    >>> import warnings, mlx.core as mx, vauban
    >>> surgeon = vauban.SparseDirectionSurgeon()
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     _ = surgeon.apply_sparse_projection(mx.eye(2), mx.array([1.0, 0.0]), side="input")
    >>> [warning.category.__name__ for warning in caught]
    ['VaubanWarning']
    """


def shown(value: object) -> str:
    """A value as an error message shows it: its repr, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
