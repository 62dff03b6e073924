"""What a configuration claims, against what mlx-lm's class does.

In reading order:
    rope           rotary positions: what is said of them, and what a module does
    translation    a configuration under the names that mlx-lm's classes read
    rope_check     rotary modules against the configuration
    window         sliding windows by the configuration and by the model
    unmet          the fields that the class does not take up, by name
"""

from vauban.claims.translation import translated
from vauban.claims.unmet import Claim, unmet_claims, unread_biases, warn_of_claims

__all__ = ["Claim", "translated", "unmet_claims", "unread_biases", "warn_of_claims"]
