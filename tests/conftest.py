"""Makes the folder of tests importable, for the parts that several tests share."""
