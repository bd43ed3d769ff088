from hypothesis import HealthCheck, settings

# Laws are many and machines slow, and the CPU is shared: few examples, and no deadline for one.
settings.register_profile("core", max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("core")
