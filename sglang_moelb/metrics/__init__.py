"""What is exported to Prometheus: one table, from which code, docs, board and tests are made."""
