"""Threat models, attacks, suites and the audit."""
