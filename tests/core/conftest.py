import os

from hypothesis import HealthCheck, settings

# Laws are many and machines slow, and the CPU is shared: few examples, and no deadline for one. CI asks for many once more.
COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("core", max_examples=30, **COMMON)
settings.register_profile("thorough", max_examples=400, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "core"))
