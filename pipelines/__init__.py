"""Ray, storage and MLflow around the method: one file per workload."""
