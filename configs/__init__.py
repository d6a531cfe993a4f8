"""The configuration tree of a run: YAML files read by ``safelight.cli`` as ``pkg://safelight.configs``."""
