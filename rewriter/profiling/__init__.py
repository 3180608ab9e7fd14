"""What `kvsink-profile` measures: attention sinks, massive activations and the experts that make them."""

from kvsink.profiling.reading import FORMAT, load_profile, profile_stages
from kvsink.profiling.record import ProfileOptions, profile

__all__ = ["FORMAT", "ProfileOptions", "load_profile", "profile", "profile_stages"]
