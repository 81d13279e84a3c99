"""The old place of `jpeft.residuals.ops`, kept for one release."""

from jpeft.residuals.ops import *  # noqa: F403
