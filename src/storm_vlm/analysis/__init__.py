"""What the latents hold, and whether the answers depend on them."""

from storm_vlm.errors import StormError


class AnalysisError(StormError, ValueError):
    """An analysis that these rows, this checkpoint or this installation do not allow; says what it needs."""
