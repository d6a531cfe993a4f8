"""A plug-in as an outside author would write it: one method and one data source, used by the tests of the CLI."""
