"""The `fsd` command: configuration, the local cluster, mounting; the only floor that reads argv, environment, files."""
