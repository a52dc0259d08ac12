"""Every test sees eight virtual CPU devices, so that one process can compare a mesh of one with a mesh of eight."""

import os

# Before the first import of jax, which reads them once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()
