"""Configurations that join Safelight's."""
