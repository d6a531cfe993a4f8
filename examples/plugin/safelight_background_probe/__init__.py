"""A plug-in for Safelight. Nothing heavy is imported here: `--help` of Safelight imports this package."""
