"""The `fsd` command: services, mounts and the local cluster.  Only this floor reads argv, environment and files."""
