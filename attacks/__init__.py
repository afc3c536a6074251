"""What an attacker does: threat models, attacks, suites and the audit."""
