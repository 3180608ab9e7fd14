"""What `kvsink-profile` measures: attention sinks, massive activations and the experts that make them."""

from kvsink.profiling.record import FORMAT, ProfileOptions, load_profile, profile, profile_stages

__all__ = ["FORMAT", "ProfileOptions", "load_profile", "profile", "profile_stages"]
